"""One optimizer update: schedule, gradient clipping, refusal of non-finite gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from kedge.errors import RunError
from kedge.training.config import OptimizerConfig

SKIPS_IN_A_ROW = 3


class Diverged(RunError):
    """Several updates in a row had a non-finite loss or gradient."""


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """Learning rate of step ``step`` (from 0) out of ``steps``: linear warm-up, then the schedule.

    >>> config = OptimizerConfig(learning_rate=1.0, schedule="linear", warmup_steps=2)
    >>> [learning_rate(config, step, 6) for step in range(6)]
    [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    shape = 1 - progress if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return config.learning_rate * (config.final_fraction + (1 - config.final_fraction) * shape)


@dataclass
class Updater:
    """AdamW over a model's trainable parameters; a non-finite loss or gradient changes nothing."""

    model: nn.Module
    config: OptimizerConfig
    steps: int
    section: str = "optimizer"
    """Where its settings stand in the stage."""
    optimizer: torch.optim.AdamW = field(init=False)
    skipped: int = 0
    skipped_in_a_row: int = 0
    unsettled: bool = False
    """Whether parameters have begun to move since the work has last taken note of an update."""

    def __post_init__(self) -> None:
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": self.config.weight_decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=self.config.learning_rate,
            betas=(self.config.betas[0], self.config.betas[1]),
            eps=self.config.eps,
        )

    def update(self, step: int, accumulate: Callable[[], float | None]) -> dict[str, float] | None:
        """Let ``accumulate`` add up gradients and give the loss, then take one optimizer step.

        ``accumulate`` may give None to call the update off, and then so does this; nothing changes.
        Returns the metrics ``loss``, ``gradient/norm`` (before clipping) and ``learning_rate``. A non-finite
        loss or norm leaves parameters and moments as they are and is counted in ``skipped``.
        """
        self.optimizer.zero_grad(set_to_none=True)
        loss = accumulate()
        if loss is None:
            self.optimizer.zero_grad(set_to_none=True)
            return None
        norm = float(gradient_norm(self.model.parameters()))
        rate = learning_rate(self.config, step, self.steps)
        if math.isfinite(loss) and math.isfinite(norm):
            self._apply(norm, rate)
            self.skipped_in_a_row = 0
        else:
            self.skipped += 1
            self.skipped_in_a_row += 1
        self.optimizer.zero_grad(set_to_none=True)
        return {"loss": loss, "gradient/norm": norm, "learning_rate": rate}

    def _apply(self, norm: float, rate: float) -> None:
        limit = self.config.max_gradient_norm
        if limit is not None and norm > limit:
            for parameter in self.model.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(limit / norm)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.unsettled = True
        self.optimizer.step()

    def check(self, step: int) -> None:
        """Raise ``Diverged`` once three updates in a row were refused."""
        if self.skipped_in_a_row >= SKIPS_IN_A_ROW:
            raise Diverged(
                f"step {step}: loss or gradient was NaN or infinite in {SKIPS_IN_A_ROW} updates in a row; none of "
                "them was applied. The samples are in samples.jsonl (kind: skipped). Lower "
                f"{self.section}.learning_rate, or look at those samples, and go on with resume=true"
            )

    def state_dict(self) -> dict[str, Any]:
        """Give everything needed to go on to the same numbers."""
        state = self.optimizer.state_dict()
        moments = {str(index): dict(values) for index, values in state["state"].items()}
        return {"moments": moments, "skipped": self.skipped, "skipped_in_a_row": self.skipped_in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore ``state_dict``."""
        full = self.optimizer.state_dict()
        moments = {int(index): dict(values) for index, values in state["moments"].items()}
        for values in moments.values():
            values["step"] = values["step"].cpu()  # where the optimizer reads it at every update
        full["state"] = moments
        self.optimizer.load_state_dict(full)
        self.skipped = state["skipped"]
        self.skipped_in_a_row = state["skipped_in_a_row"]


def gradient_norm(parameters: Iterable[nn.Parameter]) -> torch.Tensor:
    """Euclidean norm of all gradients together, accumulated in float32 at least."""
    norms = [
        torch.linalg.vector_norm(p.grad, dtype=torch.promote_types(p.grad.dtype, torch.float32))
        for p in parameters
        if p.grad is not None
    ]
    return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())
