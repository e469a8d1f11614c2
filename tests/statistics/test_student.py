"""Student's quantiles against tables and against its density, integrated."""

from __future__ import annotations

import math

import pytest

from kedge.statistics import student_quantile

TABLE = {
    (0.975, 1): 12.7062,
    (0.95, 2): 2.91999,
    (0.975, 5): 2.57058,
    (0.995, 9): 3.24984,
    (0.9, 30): 1.31042,
}
"""Abramowitz, Stegun, table 26.10."""


@pytest.mark.parametrize(("probability", "degrees"), TABLE)
def test_tabled(probability: float, degrees: int) -> None:
    assert student_quantile(probability, degrees) == pytest.approx(TABLE[probability, degrees], rel=1e-5)
    assert student_quantile(1 - probability, degrees) == -student_quantile(probability, degrees)


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 7, 12])
def test_the_density_up_to_a_quantile(degrees: int) -> None:
    scale = math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)) / math.sqrt(degrees * math.pi)

    def density(t: float) -> float:
        return scale * (1 + t * t / degrees) ** (-(degrees + 1) / 2)

    end = student_quantile(0.9, degrees)
    steps = 2000  # Simpson's rule
    width = end / steps
    weights = [1, *([4, 2] * steps)[: steps - 1], 1]
    area = width / 3 * math.fsum(w * density(i * width) for i, w in enumerate(weights))
    assert area == pytest.approx(0.4, abs=1e-9)


def test_refusals() -> None:
    for arguments in ((0.0, 3), (1.0, 3), (0.5, 0)):
        with pytest.raises(ValueError, match="must be between 0 and 1"):
            student_quantile(*arguments)
