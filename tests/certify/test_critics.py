"""The claims on generalised advantages go red when they or the critic's loss are broken."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kedge.certify import critics
from kedge.certify.critics import critic_claims
from kedge.certify.tabular import draw

PROBLEMS = {3: [draw(5, torch.float64)]}
RIGHT = critics.gae


def red() -> set[str]:
    claims = critic_claims(PROBLEMS, torch.device("cpu"), torch.float64)
    return {f"{claim.name}, {claim.what}" for claim in claims if not claim.passed}


def without_trace(rewards: Tensor, values: Tensor, lengths: Tensor, **options: Any) -> Tensor:
    """Leave λ out of the recursion."""
    return RIGHT(rewards, values, lengths, **{**options, "trace": 1.0})


def across_responses(rewards: Tensor, values: Tensor, lengths: Tensor, **options: Any) -> Tensor:
    """Run on from the end of a response into the next."""
    return RIGHT(rewards, values, lengths.sum()[None], **options)


def with_its_own_reward(rewards: Tensor, values: Tensor, lengths: Tensor, **options: Any) -> Tensor:
    """Judge a token by a critic that has seen its reward: a baseline that depends on the token."""
    return RIGHT(rewards, values + 0.5 * rewards, lengths, **options)


GRADIENTS = {f"{case.name}, gradient" for case in critics.CASES}
VALUE = "GAE, λ = 1, value"


@pytest.mark.parametrize(
    ("broken", "found"),
    [
        (without_trace, {"GAE, λ = ½, wrong critic, gradient"}),
        (across_responses, GRADIENTS - {"GAE, λ = ½, gradient"} | {VALUE}),
        (with_its_own_reward, GRADIENTS | {VALUE}),
    ],
)
def test_broken_advantages(broken: object, found: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert red() == set()
    monkeypatch.setattr(critics, "gae", broken)
    assert found - red() == set()


def test_a_broken_value_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        critics, "value_loss", lambda values, old, returns, clip: 0.5 * (values - returns).square()
    )
    assert red() == {"value loss, clipped, gradient"}
