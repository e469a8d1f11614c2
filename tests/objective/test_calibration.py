from __future__ import annotations

import math

import pytest
import torch

from kedge.objective import brier_score, expected_calibration_error


def plain(probabilities: list[float], bins: int) -> float:
    """The definition, pair by pair."""
    held: dict[int, list[tuple[float, float]]] = {}
    for p in probabilities:
        confidence = max(p, 1 - p)
        right = 0.5 if p == 0.5 else float(p > 0.5)
        held.setdefault(min(bins - 1, math.floor((confidence - 0.5) * 2 * bins)), []).append(
            (confidence, right)
        )
    return sum(
        len(pairs)
        / len(probabilities)
        * abs(sum(r for _, r in pairs) / len(pairs) - sum(c for c, _ in pairs) / len(pairs))
        for pairs in held.values()
    )


@pytest.mark.parametrize("bins", [1, 4, 10])
def test_the_definition(bins: int) -> None:
    draw = torch.Generator().manual_seed(0)
    p = torch.rand(300, generator=draw, dtype=torch.float64)
    p[:3] = torch.tensor([0.0, 0.5, 1.0])
    assert expected_calibration_error(p, bins=bins) == pytest.approx(plain(p.tolist(), bins), rel=1e-12)
    assert brier_score(p) == pytest.approx(sum((1 - x) ** 2 for x in p.tolist()) / 300, rel=1e-12)


def test_labels_drawn_from_the_probabilities_are_calibrated() -> None:
    """p given to the chosen response is q with probability q, else 1 − q: the error vanishes with many pairs."""
    draw = torch.Generator().manual_seed(1)
    q = torch.rand(200_000, generator=draw, dtype=torch.float64)
    p = torch.where(torch.rand(len(q), generator=draw, dtype=torch.float64) < q, q, 1 - q)
    assert expected_calibration_error(p) < 0.01
    assert brier_score(p) == pytest.approx(float((q * (1 - q)).mean()), abs=2e-3)
    logits = 3 * torch.logit(p)
    assert expected_calibration_error(torch.sigmoid(logits)) > 0.1  # overconfident by a factor of 3


def test_what_is_not_defined() -> None:
    with pytest.raises(ValueError, match="no pairs"):
        brier_score(torch.zeros(0))
    with pytest.raises(ValueError, match="no pairs"):
        expected_calibration_error(torch.zeros(0))
    with pytest.raises(ValueError, match="at least one bin"):
        expected_calibration_error(torch.ones(1), bins=0)
