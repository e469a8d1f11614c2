"""Kedge: reinforcement learning for language models on an exact KL anchor.

``import kedge`` is light: PyTorch is imported by the first room that needs it.

>>> import kedge
>>> kedge.__version__
'0.1.0'
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kedge.api import train as train

__version__ = "0.1.0"

_ROOMS = frozenset(
    {
        "certify",
        "data",
        "divergence",
        "head",
        "measure",
        "models",
        "objective",
        "report",
        "rewards",
        "rollout",
        "runs",
    }
    | {"tasks", "training"}
)


def __getattr__(name: str) -> Any:
    """Import a room, or ``train``, the first time it is asked for."""
    if name in _ROOMS:
        return importlib.import_module(f"kedge.{name}")
    if name == "train":
        return importlib.import_module("kedge.api").train
    raise AttributeError(f"module 'kedge' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_ROOMS, "train"})
