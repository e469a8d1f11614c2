"""What takes part in the comparison."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from benchmarks.head.inputs import Inputs

Step = Callable[[], "Tensor | None"]
"""Forward and backward: leaves gradients in ``inputs.hidden.grad`` and ``inputs.weight.grad``, returns the loss."""

KEDGE, FLOOR, PLAIN, PEER = "Kedge", "floor", "plain PyTorch", "peer"


@dataclass(frozen=True)
class Contender:
    """One way to do a task.

    Args:
        task: one of ``losses.TASKS``.
        family: contenders that differ only in a setting; the fastest setting stands for the family.
        setting: what distinguishes it in the family, in words.
        build: makes the step, once for given inputs.
        side: Kedge, the floor, plain PyTorch or a peer.
        settings: every setting, for the record.
        compiles: whether torch's compiler is used.
        default: whether users get this setting when they choose none.
    """

    task: str
    family: str
    setting: str
    build: Callable[[Inputs], Step]
    side: str
    settings: dict[str, Any] = field(default_factory=dict)
    compiles: bool = False
    default: bool = False

    @property
    def name(self) -> str:
        return f"{self.task}: {self.family}" + (f", {self.setting}" if self.setting else "")


@dataclass(frozen=True)
class Absent:
    """A contender that does not take part, with the reason."""

    task: str
    family: str
    reason: str
