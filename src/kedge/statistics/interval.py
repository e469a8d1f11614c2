"""Confidence intervals of ratios of sums over clusters."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from kedge.statistics.clustered import ratio_standard_error
from kedge.statistics.student import student_quantile

FEWEST = 8
"""Clusters from which resampling says more than Student's t: fewer have too few different resamples."""

WILDEST = 10.0
"""Quantiles of t* beyond this many of Student's come from resamples that have lost all spread, not from skew: those
without the one cluster that most of the value comes from."""

_AT_ONCE = 2**22
"""About how many counts of clusters are held at once."""


@dataclass(frozen=True)
class Estimate:
    """A value with its standard error and the bounds of its confidence interval; NaN where there is none."""

    value: float
    standard_error: float = math.nan
    low: float = math.nan
    high: float = math.nan

    @property
    def half_width(self) -> float:
        """Half the length of the interval."""
        return 0.5 * (self.high - self.low)


def estimate_ratios(
    numerators: Float[Tensor, "F C"],
    denominators: Float[Tensor, "F C"],
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> list[Estimate]:
    """Estimate F ratios r = Σ a_c / Σ b_c over C independent clusters, with intervals.

    The interval is the studentized bootstrap's: whole clusters are drawn again, C of C, and the quantiles of
    t* = (r* − r)/se(r*) take the place of the normal distribution's,

        [r − t*_{1−α/2}·se(r),  r − t*_{α/2}·se(r)]

    which follows the skew that divergences have: means of exponential variables, 16 clusters: it covers the truth
    in 95 of 100 samples, the percentile bootstrap in 89, Student's t in 92. With fewer than 8 clusters, or where
    resamples with next to no spread make t* absurd (one cluster dominates, and they lack it), Student's t with C − 1
    degrees of freedom is used.

    Args:
        numerators: a, the sums in each cluster, one row for each of the F ratios.
        denominators: b, of the same shape.
        confidence: the share of intervals that shall cover the truth.
        resamples: of the bootstrap.
        seed: equal seeds give equal intervals.

    Returns:
        One estimate a row. A single cluster has no standard error and no interval.

    Source: Efron, Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 12.

    >>> a = torch.tensor([[1.0, 2.0, 3.0, 4.0]], dtype=torch.float64)
    >>> estimate = estimate_ratios(a, torch.ones_like(a))[0]
    >>> estimate.value, round(estimate.low, 3), round(estimate.high, 3)
    (2.5, 0.446, 4.554)
    """
    a, b = numerators.double(), denominators.double()
    values = (a.sum(1) / b.sum(1)).tolist()
    errors = [ratio_standard_error(*rows) for rows in zip(a, b, strict=True)]
    clusters = a.shape[1]
    if clusters < 2:
        return [Estimate(value) for value in values]
    tail = 0.5 * (1 - confidence)
    student = student_quantile(1 - tail, clusters - 1)
    bounds = torch.tensor([[-student, student]], dtype=torch.float64).repeat(len(values), 1)
    if clusters >= FEWEST:
        drawn = _studentized(a, b, resamples, seed)
        found = torch.quantile(drawn, torch.tensor([tail, 1 - tail], dtype=torch.float64), dim=1).T
        tame = (found.abs() <= WILDEST * student).all(1, keepdim=True)  # false for NaN, too
        bounds = torch.where(tame, found, bounds)
    return [
        Estimate(value, error, value - upper * error, value - lower * error)
        for value, error, (lower, upper) in zip(values, errors, bounds.tolist(), strict=True)
    ]


def _studentized(a: Tensor, b: Tensor, resamples: int, seed: int) -> Tensor:
    """t* of each ratio in each resample, [F, resamples]; ±∞ where a resample has no spread, NaN where no ratio has."""
    ratios, clusters = a.shape
    centred = a - (a.sum(1) / b.sum(1))[:, None] * b  # small numbers, so that squares lose nothing
    moments = torch.stack([centred, b, centred**2, centred * b, b**2]).reshape(5 * ratios, clusters)
    generator = torch.Generator().manual_seed(seed)
    parts = []
    step = max(1, _AT_ONCE // clusters)
    for start in range(0, resamples, step):
        size = min(step, resamples - start)
        drawn = torch.randint(clusters, (size, clusters), generator=generator)
        counts = torch.zeros(size, clusters, dtype=torch.float64)
        counts.scatter_add_(1, drawn, torch.ones(size, clusters, dtype=torch.float64))
        above, below, aa, ab, bb = (moments @ counts.T).reshape(5, ratios, size)
        shift = above / below
        spread = (aa - 2 * shift * ab + shift**2 * bb).clamp(min=0)
        errors = (clusters / (clusters - 1) * spread).sqrt() / below
        still = errors <= 1e-12 * shift.abs()
        parts.append(torch.where(still & (shift != 0), shift.sign() * math.inf, shift / errors))
    return torch.cat(parts, dim=1)
