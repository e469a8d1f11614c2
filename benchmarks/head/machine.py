"""Where it ran: one line for people, the same for the record."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PEERS = ("liger_kernel", "cut_cross_entropy", "trl")


def machine(device: torch.device, module: str = "benchmarks.head") -> dict[str, object]:
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "command": shlex.join(["python", "-m", module, *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "revision": _revision(),
        "cpu": _cpu_model(),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "peers": {name: found for name in PEERS if (found := _version(name)) is not None},
    }


def line(found: dict[str, object]) -> str:
    peers = found["peers"]
    assert isinstance(peers, dict)
    named = ", ".join(f"{name} {number}" for name, number in peers.items()) or "no peers installed"
    where = (
        found["gpu"] or f"{found['cpu']} ({found['vectors']}), {found['threads']} of {found['cores']} cores"
    )
    return f"{where}; torch {found['torch']}; {named}"


def device_name(device: torch.device) -> str:
    """Return the name that results are filed under."""
    if device.type != "cuda":
        return device.type
    return torch.cuda.get_device_name(device).lower().replace(" ", "-")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for each in info.read_text().splitlines():
            if each.startswith("model name"):
                return each.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _revision() -> str | None:
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            capture_output=True,
            text=True,
            cwd=Path(__file__).parent,
        )
    except FileNotFoundError:
        return None
    return done.stdout.strip() or None
