"""Run directories read into memory, with names that tell them apart."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from kedge.errors import UserError
from kedge.runs import read_config, read_environment, read_metrics, read_samples

Metrics = dict[str, int | float]


@dataclass(frozen=True)
class Run:
    """One run directory's content.

    Attributes:
        name: Short and unlike the other runs' names.
        path: The folder.
        stage: The part of the configuration that says what was done: method, anchor, steps.
        environment: What it was made with.
        metrics: One row a step.
        samples: Responses kept token by token.
    """

    name: str
    path: Path
    stage: Mapping[str, Any]
    environment: Mapping[str, Any]
    metrics: Sequence[Metrics]
    samples: Sequence[Mapping[str, Any]]

    @cached_property
    def kind(self) -> Literal["sft", "reward", "policy"]:
        """Whether it learnt from examples, from preferences, or from rewards."""
        method = self.stage.get("method")
        if method is None:
            learnt = any("cross_entropy/data_policy" in row for row in self.metrics)
            return "sft" if learnt else "policy"
        if method == "reward":
            return "reward"
        return "sft" if method == "sft" else "policy"

    @property
    def step(self) -> int:
        """The last step recorded; 0 if there is none."""
        return max((int(row["step"]) for row in self.metrics), default=0)

    @property
    def steps(self) -> int | None:
        """How many steps were asked for, where the configuration says so."""
        steps = self.stage.get("steps")
        return steps if isinstance(steps, int) else None

    @property
    def seconds(self) -> float:
        """Time spent in its steps and evaluations; NaN if not recorded."""
        spent = [
            row[name]
            for row in self.metrics
            for name in ("seconds/total", "seconds/evaluation")
            if name in row
        ]
        return math.fsum(value for value in spent if math.isfinite(value)) if spent else math.nan

    @cached_property
    def evaluations(self) -> Sequence[Metrics]:
        """The rows that hold an evaluation, without the prefix ``eval/``, in order."""
        found = []
        for row in self.metrics:
            values = {
                name.removeprefix("eval/"): value for name, value in row.items() if name.startswith("eval/")
            }
            if values:
                found.append({"step": row["step"], **values})
        return found

    @cached_property
    def rewards(self) -> Sequence[str]:
        """The names of its reward functions, in the order they were first recorded."""
        names: dict[str, None] = {}
        for row in self.metrics:
            for name in row:
                head, _, tail = name.removeprefix("eval/").partition("/")
                if head == "reward":
                    names[tail] = None
        return [name for name in names if not _is_summary(name, names)]


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Read runs; a folder whose subfolders are run directories stands for them, in the order they ran.

    Raises:
        UserError: A path is no run directory, or a file in it is damaged.
    """
    folders = [folder for path in paths for folder in _expand(Path(path))]
    folders = list(dict.fromkeys(folder.resolve() for folder in folders))
    return [_read(folder, name) for folder, name in zip(folders, _names(folders), strict=True)]


def _read(folder: Path, name: str) -> Run:
    return Run(
        name=name,
        path=folder,
        stage=_stage(read_config(folder), folder.name),
        environment=read_environment(folder) or read_environment(folder.parent),
        metrics=read_metrics(folder),
        samples=read_samples(folder),
    )


def _expand(path: Path) -> list[Path]:
    if not path.is_dir():
        raise UserError(f"{path}: no such run directory.")
    inner = [folder for folder in path.iterdir() if folder.is_dir() and _holds_run(folder)]
    if inner:
        stages = (read_config(path, "recipe.yaml") or read_config(path)).get("stages") or []
        order = [stage.get("name") for stage in stages if isinstance(stage, dict)]
        return sorted(inner, key=lambda folder: _place(folder, order))
    if not _holds_run(path) and not (path / "config.yaml").exists():
        raise UserError(f"{path}: holds no run (no metrics.jsonl) and no folder that does.")
    return [path]


def _holds_run(folder: Path) -> bool:
    return (folder / "metrics.jsonl").exists()


def _place(folder: Path, order: Sequence[Any]) -> tuple[int, str, str]:
    """Sort by place in the recipe, then by start, then by name."""
    place = order.index(folder.name) if folder.name in order else len(order)
    return place, str(read_environment(folder).get("started", "~")), folder.name


def _stage(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Find the part of a configuration that describes this run: the whole, its ``stage``, or one of ``stages``."""
    if "method" in config:
        return config
    if isinstance(config.get("stage"), dict):
        return dict(config["stage"])
    stages = [stage for stage in config.get("stages") or [] if isinstance(stage, dict)]
    named = [stage for stage in stages if stage.get("name") == name]
    if named:
        return named[0]
    return stages[0] if len(stages) == 1 else config


def _names(folders: Sequence[Path]) -> list[str]:
    """Give each folder the shortest tail of its path that no other one has."""
    depth = 1
    while True:
        names = ["/".join(folder.parts[-depth:]) for folder in folders]
        longest = max((len(folder.parts) for folder in folders), default=0)
        if max(Counter(names).values(), default=1) == 1 or depth >= longest:
            return names
        depth += 1


def _is_summary(name: str, names: Mapping[str, None]) -> bool:
    if name in ("mean", "std", "unscorable_fraction"):
        return True
    base = name.removesuffix("_se")
    return base != name and (base == "mean" or base in names)
