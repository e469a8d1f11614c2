"""The claims on penalty and masks go red when one of them is broken."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kedge.certify.old_policy import MASKS, mask_claim, penalty_claims
from kedge.certify.tabular import draw
from kedge.certify.truth import Truth
from kedge.objective import DivergenceMask, divergence_mask, policy_loss

CPU, DOUBLE = torch.device("cpu"), torch.float64
PROBLEMS = [draw(seed, DOUBLE, length=2) for seed in (0, 1)]
RIGHT_KEPT = policy_loss.kept_tokens


def red() -> set[DivergenceMask]:
    return {mask for mask in MASKS if not mask_claim(mask, PROBLEMS, CPU, DOUBLE, off_policy=True).passed}


def both_ways(mask: DivergenceMask, divergence: Tensor, log_ratio: Tensor, advantages: Tensor) -> Tensor:
    """Drop a token that comes back, too."""
    return ~(divergence > mask.threshold)


def the_wrong_way(mask: DivergenceMask, divergence: Tensor, log_ratio: Tensor, advantages: Tensor) -> Tensor:
    """Drop the tokens that come back."""
    return RIGHT_KEPT(mask, divergence, -log_ratio, advantages)


def for_its_own(mask: DivergenceMask, divergence: Tensor, drawn: Tensor, lengths: Tensor) -> Tensor:
    """Drop the far tokens alone, not their responses."""
    return ~(drawn & (divergence > mask.threshold))


@pytest.mark.parametrize("broken", [both_ways, the_wrong_way])
def test_a_broken_mask_of_tokens(broken: object, monkeypatch: pytest.MonkeyPatch) -> None:
    assert red() == set()
    monkeypatch.setattr(policy_loss, "kept_tokens", broken)
    assert red() == {mask for mask in MASKS if mask.level == "token"}


def test_a_broken_mask_of_responses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy_loss, "kept_responses", for_its_own)
    assert red() == {mask for mask in MASKS if mask.level == "response"}


def test_a_broken_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(divergence_mask.TWO_OUTCOMES, "kl", lambda log_p, log_q: (log_p - log_q).exp() - 1)
    assert red() == {mask for mask in MASKS if mask.measure == "kl" and mask.form == "two_outcome"}


def test_a_penalty_in_the_other_direction(monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(claim.passed for claim in penalty_claims(PROBLEMS, CPU, DOUBLE))
    right = policy_loss.PolicyLoss.__call__
    monkeypatch.setattr(
        policy_loss.PolicyLoss,
        "want",
        lambda self: frozenset({"log_prob", "old.forward_kl", "old.reverse_kl"}),
    )
    monkeypatch.setattr(
        policy_loss.PolicyLoss,
        "__call__",
        lambda self, scores, inputs: right(
            self, {**scores, "old.forward_kl": scores["old.reverse_kl"]}, inputs
        ),
    )
    assert not any(claim.passed for claim in penalty_claims(PROBLEMS, CPU, DOUBLE))


def test_truth_knows_the_values_of_states() -> None:
    """E[r] at the root; a state's value is the mean of those that follow it."""
    problem = PROBLEMS[0]
    truth, rewards = Truth(problem, False), torch.arange(9, dtype=DOUBLE)
    values, pi = truth.values(rewards), truth.log_pi.detach().exp()
    assert values[0].item() == pytest.approx((truth.responses(truth.log_pi) * rewards).sum().item())
    following = problem.states[::3, 1]
    assert values[0].item() == pytest.approx(float((pi[0] * values[following]).sum()))
    assert values[following[1]].item() == pytest.approx(float((pi[following[1]] * rewards[3:6]).sum()))
