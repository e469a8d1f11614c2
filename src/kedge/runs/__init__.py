"""The run directory: what a run leaves behind, written so that a kill or a full disk harms nothing.

``kedge.runs`` is light: PyTorch is imported only where it is needed, so that reading a run does without it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from kedge.runs.atomic import atomic_directory, recover_leftovers
from kedge.runs.directory import (
    RunDirectory,
    changed_settings,
    read_config,
    read_environment,
    read_metrics,
    read_samples,
)
from kedge.runs.environment import environment
from kedge.runs.sinks import SINKS, Sink, open_sinks

if TYPE_CHECKING:
    from kedge.runs.state import load_state, save_state

__all__ = [
    "SINKS",
    "RunDirectory",
    "Sink",
    "atomic_directory",
    "changed_settings",
    "environment",
    "load_state",
    "open_sinks",
    "read_config",
    "read_environment",
    "read_metrics",
    "read_samples",
    "recover_leftovers",
    "save_state",
]


def __getattr__(name: str) -> Any:
    """Import the tensor files, and with them PyTorch, the first time they are asked for."""
    if name in {"load_state", "save_state"}:
        return getattr(importlib.import_module("kedge.runs.state"), name)
    raise AttributeError(f"module 'kedge.runs' has no attribute {name!r}")
