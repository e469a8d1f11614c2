"""What ran, in words: method, anchor, machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kedge.report.numbers import count, duration
from kedge.report.reading import Run

_METHODS = {"sft": "supervised fine-tuning", "grpo": "GRPO", "ppo": "PPO", "reward": "reward model"}


def method(run: Run) -> str:
    """Name the method as people call it."""
    name = run.stage.get("method")
    return _METHODS.get(str(name), str(name)) if name is not None else "–"


def anchor(settings: Mapping[str, Any] | None) -> str:
    """Say in a line what ties the policy to its reference.

    >>> anchor({"measure": "exact", "gradient": "token", "controller": {"kind": "budget", "budget": 0.1}})
    'exact KL (token gradient), budget 0.1 nats/token'
    >>> anchor({"measure": "k3", "gradient": "published", "controller": {"kind": "fixed", "beta": 0.3}})
    'k3 (published gradient), β = 0.3'
    >>> anchor({"measure": "exact", "controller": {"kind": "fixed", "beta": 0}})
    'none (β = 0)'
    """
    if not settings:
        return "–"
    controller = settings.get("controller") or {}
    kind, unit = controller.get("kind"), controller.get("unit", "nats/token")
    if kind == "budget":
        tie = f"budget {controller.get('budget'):g} {unit}"
    elif kind == "adaptive":
        tie = f"adaptive β, target {controller.get('target'):g} {unit}"
    else:
        beta = controller.get("beta")
        if beta == 0:
            return "none (β = 0)"
        tie = f"β = {beta:g}" if isinstance(beta, int | float) else "β fixed"
    measure = settings.get("measure", "exact")
    parts = ["exact KL" if measure == "exact" else str(measure)]
    if settings.get("direction") == "forward":
        parts.append("forward")
    if settings.get("placement") == "reward":
        parts.append("in the reward")
    if "gradient" in settings:
        parts.append(f"({settings['gradient']} gradient)")
    return f"{' '.join(parts)}, {tie}"


def progress(run: Run) -> str:
    """Say how far it is.

    >>> from pathlib import Path
    >>> progress(Run("a", Path("a"), {"steps": 120}, {}, [{"step": 30}], []))
    '30 of 120 · in progress'
    """
    if run.steps is None or run.step >= run.steps:
        return f"{run.step}"
    return f"{run.step} of {run.steps} · in progress"


def lines(runs: Sequence[Run]) -> list[dict[str, str]]:
    """One line for each run: what the header's list shows."""
    return [
        {
            "name": run.name,
            "method": method(run),
            "anchor": anchor(run.stage.get("anchor")) if run.kind == "policy" else "",
            "steps": progress(run),
            "time": duration(run.seconds),
            "path": str(run.path),
        }
        for run in runs
    ]


def facts(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """Facts about model, machine and versions: one value where the runs agree, else all; the earliest start."""
    found = []
    for label in _facts(None):
        values = list(dict.fromkeys(value for run in runs if (value := _facts(run)[label])))
        if values:
            found.append((label, min(values) if label == "started" else ", ".join(values)))
    return found


def _facts(run: Run | None) -> dict[str, str]:
    environment: Mapping[str, Any] = run.environment if run is not None else {}
    versions = environment.get("versions") or {}
    git = environment.get("git") or {}
    parameters = environment.get("parameters")
    device = environment.get("device_name") or environment.get("device") or ""
    threads = environment.get("threads")
    revision = str(git.get("revision", ""))[:10]
    return {
        "model": str(environment.get("model") or ""),
        "parameters": count(parameters) if isinstance(parameters, int | float) else "",
        "seed": str(environment.get("seed", "")),
        "reference": str(environment.get("reference") or "")[:12],
        "device": f"{device}, {threads} thread{'s' * (threads > 1)}"
        if device == "cpu" and threads
        else str(device),
        "versions": " · ".join(f"{name} {version}" for name, version in versions.items()),
        "revision": f"{revision}, changed" if revision and git.get("changed") else revision,
        "started": str(environment.get("started", "")).replace("T", " ").replace("+00:00", " UTC"),
        "command": " ".join(environment.get("command") or []),
    }
