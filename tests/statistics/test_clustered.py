"""Standard errors of clustered means against their definitions and against repetition."""

from __future__ import annotations

import math

import pytest
import torch

from kedge.statistics import clustered_standard_error, clustered_sums, ratio_standard_error


def test_clusters_of_one_are_the_textbook() -> None:
    values = torch.randn(20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    truth = float(values.std()) / math.sqrt(20)
    assert ratio_standard_error(values, torch.ones(20)) == pytest.approx(truth, rel=1e-12)
    assert clustered_standard_error(values, torch.arange(20)) == pytest.approx(truth, rel=1e-12)


def test_sums_are_taken_in_double() -> None:
    values = torch.tensor([1e8, 1.0, -1e8, 5.0])
    assert clustered_sums(values, torch.tensor([1, 1, 1, 0]), 2).tolist() == [5.0, 1.0]


def test_a_ratio_in_repetition() -> None:
    """The stated error is the spread of the ratio over many samples of clusters of different sizes."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(1, 9, (3000, 40), generator=generator).double()
    level = 1 + 0.5 * torch.randn(3000, 40, dtype=torch.float64, generator=generator)
    sums = sizes * level
    ratios = sums.sum(1) / sizes.sum(1)
    stated = [ratio_standard_error(*each) for each in zip(sums[:500], sizes[:500], strict=True)]
    assert math.fsum(stated) / 500 == pytest.approx(float(ratios.std()), rel=0.04)


def test_what_is_missing() -> None:
    values = torch.tensor([1.0, float("nan"), 3.0, float("nan")])
    assert clustered_standard_error(values, torch.tensor([0, 0, 1, 2])) == 1.0
    assert math.isnan(clustered_standard_error(values[:2], torch.tensor([0, 0])))
    assert math.isnan(clustered_standard_error(values[1:2], torch.tensor([0])))
    assert math.isnan(ratio_standard_error(torch.ones(1), torch.ones(1)))
