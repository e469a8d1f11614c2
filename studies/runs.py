"""Many runs from one start: stages of one recipe, trained or taken up where they were, and what they measured."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import kedge
from kedge import recipes
from kedge.runs import read_metrics
from kedge.training.recipe import load_recipe

Stage = dict[str, Any]
Row = dict[str, float]


def shipped(name: str) -> dict[str, Any]:
    """Give a recipe that ships with Kedge, as data."""
    return load_recipe(recipes.path(name)).model_dump(mode="json", exclude_unset=True)


def train(recipe: Mapping[str, Any], folder: Path, seed: int) -> Path:
    """Train what is not finished of a recipe; give its folder, with a run directory a stage."""
    kedge.train({**recipe, "out": str(folder), "seed": seed, "resume": True})
    return folder


def rows(folder: Path, stage: str, key: str) -> list[Row]:
    """Give the metrics of a stage at the steps that have ``key``."""
    return [
        {name: float(value) for name, value in row.items()}
        for row in read_metrics(folder / stage)
        if key in row
    ]


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Give the mean with its standard error; NaN for the error of a single value, and for both where a value is NaN.

    >>> mean_and_error([1.0, 3.0])
    (2.0, 1.0)
    """
    mean = statistics.fmean(values)
    if len(values) < 2 or not math.isfinite(mean):
        return mean, math.nan
    return mean, statistics.stdev(values) / len(values) ** 0.5


def shown(values: Iterable[float], digits: int = 2) -> str:
    """Write mean and standard error; a single value has none."""
    mean, error = mean_and_error(list(values))
    return f"{mean:.{digits}f}" + ("" if math.isnan(error) else f" ± {error:.{digits}f}")
