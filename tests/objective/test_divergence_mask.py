"""Masks by measured divergence: who drops out, by hand, on both sides of the threshold."""

from __future__ import annotations

import math

import pytest
import torch

from kedge.divergence import two_outcome_kl, two_outcome_total_variation
from kedge.objective import DivergenceMask
from kedge.objective.divergence_mask import divergences, kept_responses, kept_tokens


def double(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_a_token_drops_out_where_it_would_go_on() -> None:
    divergence = double(0.2, 0.2, 0.2, 0.2, 0.1, 0.05, 0.2, 0.2)
    log_ratio = double(0.5, 0.5, -0.5, -0.5, 0.5, 0.5, 0.0, 0.5)
    advantages = double(2.0, -2.0, 2.0, -2.0, 2.0, 2.0, 2.0, 0.0)
    kept = kept_tokens(DivergenceMask("kl", 0.1), divergence, log_ratio, advantages)
    assert kept.tolist() == [False, True, True, False, True, True, True, True]


def test_a_response_drops_out_for_its_worst_token() -> None:
    mask = DivergenceMask("kl", 0.2, level="response")
    divergence = double(0.1, 0.3, 0.2, 0.2, math.nan, 0.1, 9.0)
    drawn = torch.tensor([True, True, True, True, False, True, False])
    kept = kept_responses(mask, divergence, drawn, torch.tensor([2, 2, 0, 3]))
    assert kept.tolist() == [False, False, True, True, True, True, True]


@pytest.mark.parametrize(
    ("measure", "name", "by_hand"),
    [("tv", "total_variation", two_outcome_total_variation), ("kl", "forward_kl", two_outcome_kl)],
)
def test_what_the_divergence_is(measure: str, name: str, by_hand: object) -> None:
    exact = DivergenceMask(measure, 0.1)  # type: ignore[arg-type]
    assert exact.outputs == {f"old.{name}"}
    found = divergences(exact, {f"old.{name}": double(0.3).requires_grad_()}, None)
    assert found.tolist() == [0.3]
    assert not found.requires_grad
    sampled = DivergenceMask(measure, 0.1, form="two_outcome")  # type: ignore[arg-type]
    assert sampled.outputs == {"log_prob"}
    log_prob, behaviour = double(0.7).log().requires_grad_(), double(0.4).log()
    found = divergences(sampled, {"log_prob": log_prob}, behaviour)
    assert found.tolist() == by_hand(behaviour, log_prob).tolist()  # type: ignore[operator]
    assert divergences(sampled, {"log_prob": log_prob}, None).tolist() == [0.0]


@pytest.mark.parametrize(
    ("measure", "threshold", "message"),
    [
        ("kl", 0.0, "must be a finite number above 0"),
        ("kl", math.inf, "must be a finite number above 0"),
        ("tv", math.nan, "must be a finite number above 0"),
        ("tv", 1.0, "would mask nothing"),
    ],
)
def test_a_threshold_acts_or_is_refused(measure: str, threshold: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DivergenceMask(measure, threshold)  # type: ignore[arg-type]
    DivergenceMask("kl", 1.0)
