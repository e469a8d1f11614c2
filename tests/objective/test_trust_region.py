"""Surrogates and their gradients by hand, on both sides of every bound."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kedge.objective import TrustRegion, clip_masks, ratio, surrogate

RATIOS = [0.5, 1.0, 1.5, 0.5, 1.0, 1.5, 4.0]
ADVANTAGES = [2.0, 2.0, 2.0, -2.0, -2.0, -2.0, -2.0]


def evaluate(region: TrustRegion) -> tuple[list[float], list[float], Tensor, Tensor]:
    """Return values, derivatives with respect to log π, and the two clip masks."""
    log_prob = torch.tensor(RATIOS, dtype=torch.float64).log().requires_grad_()
    advantages = torch.tensor(ADVANTAGES, dtype=torch.float64)
    w = ratio(log_prob, torch.zeros(len(RATIOS), dtype=torch.float64))
    value = surrogate(region, w, log_prob, advantages)
    (slope,) = torch.autograd.grad(value.sum(), log_prob)
    return value.tolist(), slope.tolist(), *clip_masks(region, w.detach(), advantages)


def test_none_is_the_importance_weighted_advantage() -> None:
    value, slope, low, high = evaluate(TrustRegion("none"))
    assert value == pytest.approx([1, 2, 3, -1, -2, -3, -8])
    assert slope == pytest.approx(value)
    assert not (low | high).any()


def test_clip_takes_the_smaller_and_its_gradient() -> None:
    value, slope, low, high = evaluate(TrustRegion("clip", low=0.2, high=0.3))
    assert value == pytest.approx([1, 2, 2.6, -1.6, -2, -3, -8])
    assert slope == pytest.approx([1, 2, 0, 0, -2, -3, -8])
    assert low.tolist() == [False, False, False, True, False, False, False]
    assert high.tolist() == [False, False, True, False, False, False, False]


def test_dual_clip_bounds_what_a_bad_token_can_cost() -> None:
    value, slope, low, high = evaluate(TrustRegion("clip", low=0.2, high=0.3, dual=3.0))
    assert value == pytest.approx([1, 2, 2.6, -1.6, -2, -3, -6])
    assert slope == pytest.approx([1, 2, 0, 0, -2, -3, 0])
    assert low.tolist() == [False, False, False, True, False, False, False]
    assert high.tolist() == [False, False, True, False, False, False, True]


def test_cispo_clips_the_weight_and_keeps_the_gradient() -> None:
    value, slope, low, high = evaluate(TrustRegion("cispo", low=0.2, high=0.3))
    weights = [0.8, 1.0, 1.3, 0.8, 1.0, 1.3, 1.3]
    assert slope == pytest.approx([w * a for w, a in zip(weights, ADVANTAGES, strict=True)])
    assert value == pytest.approx([s * math.log(w) for s, w in zip(slope, RATIOS, strict=True)])
    assert low.tolist() == [True, False, False, True, False, False, False]
    assert high.tolist() == [False, False, True, False, False, True, True]


def test_a_sequence_ratio_has_its_value_from_the_response_and_its_gradient_from_the_token() -> None:
    log_prob = torch.tensor([-1.0, -2.0], dtype=torch.float64, requires_grad=True)
    mean = torch.tensor([math.log(1.1), math.log(1.5)], dtype=torch.float64)
    w = ratio(log_prob, None, mean)
    assert w.tolist() == pytest.approx([1.1, 1.5])
    advantages = torch.tensor([2.0, 2.0], dtype=torch.float64)
    value = surrogate(TrustRegion("sequence"), w, log_prob, advantages)
    (slope,) = torch.autograd.grad(value.sum(), log_prob)
    assert value.tolist() == pytest.approx([2.2, 2.4])
    assert slope.tolist() == pytest.approx([2.2, 0.0])


def test_on_policy_the_ratio_is_one_and_its_gradient_the_score() -> None:
    log_prob = torch.tensor([-1.0, -7.0], dtype=torch.float64, requires_grad=True)
    w = ratio(log_prob, None)
    assert w.tolist() == [1.0, 1.0]
    (slope,) = torch.autograd.grad(w.sum(), log_prob)
    assert slope.tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"low": -0.1}, "must not be negative"),
        ({"high": math.nan}, "must not be negative"),
        ({"dual": 1.0}, "dual must be above 1"),
        ({"kind": "cispo", "dual": 3.0}, "dual clip does nothing"),
        ({"kind": "none", "dual": 3.0}, "dual clip does nothing"),
    ],
)
def test_what_means_nothing_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrustRegion(**options)  # type: ignore[arg-type]
