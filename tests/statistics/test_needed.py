"""How many more are needed, checked by drawing them."""

from __future__ import annotations

import math

import pytest
import torch

from kedge.statistics import Estimate, estimate_ratios, samples_needed
from kedge.statistics.needed import variance_components


def draw(clusters: int, size: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cluster means vary with standard deviation 1, values in a cluster with 3."""
    generator = torch.Generator().manual_seed(seed)
    level = 10 + torch.randn(clusters, 1, dtype=torch.float64, generator=generator)
    values = level + 3 * torch.randn(clusters, size, dtype=torch.float64, generator=generator)
    return values.flatten(), torch.arange(clusters).repeat_interleave(size)


def estimate(values: torch.Tensor, clusters: int) -> Estimate:
    sums = values.reshape(1, clusters, -1).mean(2)
    return estimate_ratios(sums, torch.ones_like(sums))[0]


def test_components() -> None:
    between, within = variance_components(*draw(20_000, 4, seed=0))
    assert between == pytest.approx(1.0, rel=0.1)
    assert within == pytest.approx(9.0, rel=0.03)


def test_drawing_what_is_needed_gives_the_width() -> None:
    values, cluster = draw(400, 4, seed=1)
    found = samples_needed(estimate(values, 400), values, cluster, 0.12)
    assert found.clusters is not None
    assert found.samples_per_cluster is not None
    more = draw(found.clusters, 4, seed=2)[0]
    assert estimate(more, found.clusters).half_width == pytest.approx(0.12, rel=0.1)
    larger = draw(400, found.samples_per_cluster, seed=3)[0]
    assert estimate(larger, 400).half_width == pytest.approx(0.12, rel=0.15)
    assert samples_needed(estimate(values, 400), values, cluster, 0.05).samples_per_cluster is None


def test_edges() -> None:
    values, cluster = torch.ones(4), torch.tensor([0, 0, 1, 1])
    assert samples_needed(Estimate(1.0, 0.0, 1.0, 1.0), values, cluster, 0.1).clusters == 1
    assert samples_needed(Estimate(1.0), values, cluster, 0.1).clusters is None
    assert samples_needed(Estimate(1.0, math.nan, math.nan, math.nan), values, cluster, 0.0).clusters is None
