"""What a run was made with: versions, machine, seed, code revision, reference."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from typing import Any

import kedge


def environment(*, device: str, seed: int, reference: str | None = None, **more: Any) -> dict[str, Any]:
    """Describe what a run is made with, for ``RunDirectory.record_environment``.

    Args:
        device: The torch device in use, such as ``cpu`` or ``cuda:0``.
        seed: The run's seed.
        reference: The reference's identity, the hash of its weights (``kedge.models.fingerprint``).
        more: Further entries; the report shows ``parameters`` (a count) and ``model``.

    Returns:
        Entries that JSON can hold: ``started`` (UTC), ``versions`` of Python, Kedge, torch and transformers,
        ``device``, for CUDA ``device_name``, ``threads``, ``platform``, ``seed``, ``git`` (revision and whether files
        were changed since, None outside a repository), ``command``, ``process``, ``reference``, and ``more``.

    >>> environment(device="cpu", seed=3)["versions"]["kedge"]
    '0.1.0'
    """
    import torch  # here, so that reading run directories stays light

    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {
            "python": platform.python_version(),
            "kedge": kedge.__version__,
            "torch": torch.__version__,
            "transformers": metadata.version("transformers"),
        },
        "device": device,
        **({"device_name": torch.cuda.get_device_name(device)} if device.startswith("cuda") else {}),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "seed": seed,
        "git": _git_revision(),
        "command": [str(part) for part in sys.argv],
        "process": os.getpid(),
        "reference": reference,
        **more,
    }


def _git_revision() -> dict[str, Any] | None:
    revision = _git("rev-parse", "HEAD")
    if revision is None:
        return None
    return {"revision": revision, "changed": bool(_git("status", "--porcelain", "--untracked-files=no"))}


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], capture_output=True, text=True, timeout=10, check=False, errors="replace"
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
