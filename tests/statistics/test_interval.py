"""Intervals: what they cover, how they scale, what they do at the edges."""

from __future__ import annotations

import math

import pytest
import torch

from kedge.statistics import Estimate, estimate_ratios, student_quantile


def test_skewed_means_are_covered() -> None:
    """Means of 16 exponential variables; the plain percentile bootstrap covers 89 of 100."""
    generator = torch.Generator().manual_seed(0)
    values = torch.empty(400, 16, dtype=torch.float64).exponential_(generator=generator)
    found = estimate_ratios(values, torch.ones_like(values))
    covered = sum(each.low <= 1.0 <= each.high for each in found)
    assert 365 <= covered <= 395  # 95 % ± 2.6 standard deviations and a little
    lengths = [(each.value - each.low, each.high - each.value) for each in found]
    assert sum(above > below for below, above in lengths) > 380  # the skew is seen


def test_scale_and_shift() -> None:
    values = torch.empty(1, 12, dtype=torch.float64).exponential_(generator=torch.Generator().manual_seed(1))
    ones = torch.ones_like(values)
    (one,), (other,) = estimate_ratios(values, ones), estimate_ratios(3 * values + 1, ones)
    for name in ("value", "low", "high"):
        assert getattr(other, name) == pytest.approx(3 * getattr(one, name) + 1, rel=1e-9)
    assert other.standard_error == pytest.approx(3 * one.standard_error, rel=1e-9)
    assert estimate_ratios(values, ones) == [one]
    assert estimate_ratios(values, ones, seed=1) != [one]
    assert estimate_ratios(values, ones, confidence=0.5)[0].half_width < one.half_width
    assert estimate_ratios(values.repeat(2, 1), ones.repeat(2, 1)) == [one, one]


def test_few_clusters_take_students_t() -> None:
    values = torch.tensor([[1.0, 2.0, 6.0]], dtype=torch.float64)
    (found,) = estimate_ratios(values, torch.ones_like(values))
    assert found.value == 3.0
    assert found.high - found.value == pytest.approx(student_quantile(0.975, 2) * found.standard_error)
    assert estimate_ratios(values[:, :1], torch.ones(1, 1)) == [Estimate(1.0, *[math.nan] * 3)] or math.isnan(
        estimate_ratios(values[:, :1], torch.ones(1, 1))[0].low
    )


def test_values_without_spread() -> None:
    ones = torch.ones(1, 20, dtype=torch.float64)
    (found,) = estimate_ratios(2 * ones, ones)
    assert (found.value, found.standard_error, found.low, found.high) == (2.0, 0.0, 2.0, 2.0)
    rare = torch.zeros(1, 20, dtype=torch.float64)
    rare[0, 0] = 1.0  # a third of the resamples miss it and have no spread at all
    (found,) = estimate_ratios(rare, ones)
    assert found.high - found.value == pytest.approx(student_quantile(0.975, 19) * found.standard_error)


def test_one_cluster_that_dominates() -> None:
    """Resamples without it have next to no spread, and a t* that means nothing; as if they had none at all."""
    values = torch.full((1, 16), 1e-4, dtype=torch.float64)
    values *= 1 + 0.1 * torch.randn(1, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values[0, 0] = 1.0
    (found,) = estimate_ratios(values, torch.ones_like(values))
    assert found.high - found.value == pytest.approx(student_quantile(0.975, 15) * found.standard_error)


def test_an_infinite_value_has_no_interval() -> None:
    values = torch.ones(1, 10, dtype=torch.float64)
    values[0, 3] = math.inf
    (found,) = estimate_ratios(values, torch.ones_like(values))
    assert found.value == math.inf
    assert math.isnan(found.standard_error)
