"""What each anchor adds, by hand, and which ones are refused or warned of."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from kedge.objective import (
    Anchor,
    PolicyLoss,
    TrustRegion,
    anchor_rewards,
    anchor_term,
    anchor_to_go,
    anchor_token_rewards,
    anchor_values,
    caution,
    gae,
    refusal,
    terminal_rewards,
)
from kedge.objective.anchor import undefined

EVERY = [
    Anchor(*fields)
    for fields in itertools.product(
        ("exact", "k1", "k2", "k3"),
        ("reverse", "forward"),
        ("loss", "reward"),
        ("published", "token", "sequence"),
        ("none", "prefix"),
        (False, True),
    )
]
MEANINGFUL = {
    "loss": {
        ("exact", "reverse"): {"published", "token", "sequence"},
        ("exact", "forward"): {"published", "token"},
        ("k1", "reverse"): {"token", "sequence"},
        ("k2", "reverse"): {"published", "token"},
        ("k3", "reverse"): {"published", "token"},
    },
    "reward": {
        ("k1", "reverse"): {"published", "token", "sequence"},
        ("k2", "reverse"): {"published"},
        ("k3", "reverse"): {"published"},
    },
}


@pytest.mark.parametrize("anchor", EVERY, ids=str)
def test_refused_are_exactly_those_that_mean_nothing(anchor: Anchor) -> None:
    fine = anchor.gradient in MEANINGFUL[anchor.placement].get((anchor.measure, anchor.direction), set())
    if anchor.gradient != "sequence":
        fine = fine and anchor.weights == "none" and not anchor.baseline
    if anchor.placement == "reward":
        fine = fine and anchor.weights == "none"
    assert (refusal(anchor) is None) == fine
    if undefined(anchor) is not None:
        assert refusal(anchor) == undefined(anchor)
        with pytest.raises(ValueError, match=r"use measure exact|do nothing with|act in the loss only"):
            PolicyLoss(TrustRegion(), anchor, beta=0.1)
    else:
        PolicyLoss(TrustRegion(), anchor, beta=0.1)


@pytest.mark.parametrize(
    ("anchor", "words"),
    [
        (Anchor("k1", gradient="published"), "expected gradient of zero"),
        (Anchor("exact", placement="reward"), "does not depend on the token drawn"),
        (Anchor("k3", gradient="sequence"), "no right gradient over whole responses"),
        (Anchor("k2", placement="reward"), "not right per state"),
        (Anchor("k3", direction="forward"), "drawn from the reference"),
        (Anchor("exact", direction="forward", gradient="sequence"), "expectation under the reference"),
        (Anchor("exact", weights="prefix"), "sequence only"),
        (Anchor("exact", baseline=True), "sequence only"),
        (Anchor("k1", placement="reward", gradient="sequence", weights="prefix"), "loss only"),
    ],
    ids=str,
)
def test_the_reason_is_given(anchor: Anchor, words: str) -> None:
    assert words in str(refusal(anchor))


def test_only_the_fields_biased_practice_is_warned_of() -> None:
    warned = {(a.measure, a.placement, a.gradient) for a in EVERY if refusal(a) is None and caution(a)}
    assert warned == {
        ("k3", "loss", "published"),
        ("k1", "reward", "published"),
        ("k2", "reward", "published"),
        ("k3", "reward", "published"),
    }


def scores(log_prob: list[float], reference: list[float], kl: list[float]) -> dict[str, torch.Tensor]:
    named = {
        "log_prob": log_prob,
        "reference.log_prob": reference,
        "reference.reverse_kl": kl,
        "reference.forward_kl": [10 * value for value in kl],
    }
    return {
        name: torch.tensor(value, dtype=torch.float64, requires_grad=True) for name, value in named.items()
    }


SCORES = scores([-1.0, -2.0, -0.5], [-3.0, -1.5, -0.5], [0.3, 0.7, 0.1])
LENGTHS, GROUP, MASK = torch.tensor([2, 1]), torch.tensor([0, 0]), torch.ones(3, dtype=torch.bool)
LOG_RATIO = torch.tensor([2.0, 3.0, 0.5], dtype=torch.float64).log()


@pytest.mark.parametrize(
    ("anchor", "expected", "outputs"),
    [
        (Anchor("exact"), [0.3, 0.7, 0.1], {"reference.reverse_kl"}),
        (Anchor("exact", "forward"), [3.0, 7.0, 1.0], {"reference.forward_kl"}),
        (Anchor("k1"), [2.0, -0.5, 0.0], {"reference.log_prob"}),
        (Anchor("k2"), [2.0, 0.125, 0.0], {"reference.log_prob"}),
        (Anchor("k3"), [math.exp(-2) + 1, math.exp(0.5) - 1.5, 0.0], {"reference.log_prob"}),
    ],
    ids=str,
)
def test_values(anchor: Anchor, expected: list[float], outputs: set[str]) -> None:
    assert anchor_values(anchor, SCORES).tolist() == pytest.approx(expected, abs=1e-15)
    assert anchor.outputs == outputs


@pytest.mark.parametrize(
    ("anchor", "slope"),
    [
        (Anchor("k1", gradient="published"), [1.0, 1.0, 1.0]),
        (Anchor("k2", gradient="published"), [2.0, -0.5, 0.0]),
        (Anchor("k3", gradient="published"), [1 - math.exp(-2), 1 - math.exp(0.5), 0.0]),
        (Anchor("k1", gradient="token"), [2.0 * 2, -0.5 * 3, 0.0]),
        (Anchor("k3", gradient="token"), [2.0 * 2, -0.5 * 3, 0.0]),
        (Anchor("k1", gradient="sequence"), [5.0, 6.0, 7.0]),
    ],
    ids=str,
)
def test_slopes_of_sampled_terms(anchor: Anchor, slope: list[float]) -> None:
    to_go = torch.tensor([5.0, 6.0, 7.0], dtype=torch.float64)
    behaviour = SCORES["log_prob"].detach() - LOG_RATIO
    term = anchor_term(anchor, SCORES, behaviour, torch.ones_like(to_go), to_go)
    (found,) = torch.autograd.grad(term.sum(), SCORES["log_prob"])
    assert found.tolist() == pytest.approx(slope)
    assert term.tolist() == pytest.approx(anchor_values(anchor, SCORES).tolist())


def test_exact_sequence_term_has_both_parts() -> None:
    weights, to_go = (
        torch.tensor(values, dtype=torch.float64) for values in ([1.0, 2.0, 1.0], [0.7, 0.0, 0.0])
    )
    term = anchor_term(Anchor("exact", gradient="sequence"), SCORES, None, weights, to_go)
    score, kl = torch.autograd.grad(term.sum(), [SCORES["log_prob"], SCORES["reference.reverse_kl"]])
    assert term.tolist() == pytest.approx([0.3, 1.4, 0.1])
    assert score.tolist() == [0.7, 0.0, 0.0]
    assert kl.tolist() == [1.0, 2.0, 1.0]


def test_sequence_without_statistics_is_an_error() -> None:
    with pytest.raises(ValueError, match="call prepare first"):
        anchor_term(Anchor("exact", gradient="sequence"), SCORES)


@pytest.mark.parametrize(
    ("anchor", "weights", "to_go"),
    [
        (Anchor("exact", gradient="sequence"), [1, 1, 1], [4.0, 0, 0]),
        (Anchor("exact", gradient="sequence", weights="prefix"), [1, 2, 1], [2 * 4.0, 0, 0]),
        (Anchor("k1", gradient="sequence"), [1, 1, 1], [5.0, 4.0, 10.0]),
        (Anchor("k1", gradient="sequence", weights="prefix"), [2, 6, 0.5], [2 + 24.0, 24.0, 5.0]),
        (Anchor("k1", gradient="sequence", baseline=True), [1, 1, 1], [-5.0, 4.0, 5.0]),
        (
            Anchor("k1", gradient="sequence", weights="prefix", baseline=True),
            [2, 6, 0.5],
            [26 - 2 * 5.0, 24.0, 5 - 0.5 * 26.0],
        ),
        (Anchor("exact", placement="reward", gradient="sequence"), [1, 1, 1], [5.0, 4.0, 10.0]),
    ],
    ids=str,
)
def test_to_go_by_hand(anchor: Anchor, weights: list[float], to_go: list[float]) -> None:
    values = torch.tensor([1.0, 4.0, 10.0], dtype=torch.float64)
    found = anchor_to_go(anchor, values, LOG_RATIO, MASK, LENGTHS, GROUP)
    assert found[0].tolist() == pytest.approx(weights)
    assert found[1].tolist() == pytest.approx(to_go)


def test_tokens_of_a_tool_have_no_kl_and_no_weight() -> None:
    anchor = Anchor("k1", gradient="sequence", weights="prefix")
    values = torch.tensor([1.0, math.nan, 10.0], dtype=torch.float64)
    log_ratio = torch.tensor([math.log(2.0), math.inf, math.log(5.0)], dtype=torch.float64)
    mask, one = torch.tensor([True, False, True]), torch.tensor([0])
    weights, to_go = anchor_to_go(anchor, values, log_ratio, mask, torch.tensor([3]), one)
    assert weights.tolist() == pytest.approx([2, 2, 10])
    assert to_go.tolist() == pytest.approx([102, 100, 100])


def test_the_fused_forms_caution_is_for_what_divides_it() -> None:
    fused = Anchor("k1", placement="reward", gradient="published")
    assert "divides the reward and the KL in it alike" in str(caution(fused))
    assert caution(fused, rescaled=False) is None
    assert caution(Anchor("k3", placement="reward", gradient="published"), rescaled=False) is not None


def test_rlhfs_form_is_a_reward_of_each_token() -> None:
    """−β·k_t token by token; it adds up to the terminal score's reward-to-go, the form of the papers."""
    anchor = Anchor("k1", placement="reward", gradient="published")
    found = anchor_token_rewards(anchor, 0.5, SCORES, torch.tensor([True, True, False]))
    assert found.tolist() == pytest.approx([-1.0, 0.25, 0.0])
    assert not found.requires_grad
    rewards = terminal_rewards(torch.tensor([7.0, 5.0], dtype=torch.float64), LENGTHS) + found
    assert rewards.tolist() == pytest.approx([-1.0, 7.25, 5.0])
    advantages = gae(rewards, torch.zeros(3, dtype=torch.float64), LENGTHS, trace=1.0)
    assert advantages.tolist() == pytest.approx([6.25, 7.25, 5.0])


def test_the_fused_form_sums_over_unmasked_tokens() -> None:
    anchor = Anchor("k2", placement="reward", gradient="published")
    mask = torch.tensor([True, False, True])
    found = anchor_rewards(anchor, 0.5, SCORES, mask, LENGTHS)
    assert found.tolist() == pytest.approx([-1.0, 0.0])
    assert not found.requires_grad


@pytest.mark.parametrize(
    "anchor", [Anchor("k1"), Anchor("k1", placement="reward", gradient="sequence")], ids=str
)
def test_what_does_not_join_the_reward_is_an_error(anchor: Anchor) -> None:
    with pytest.raises(ValueError, match="only placement reward with gradient published"):
        anchor_rewards(anchor, 0.5, SCORES, MASK, LENGTHS)
    with pytest.raises(ValueError, match="only placement reward with gradient published"):
        anchor_token_rewards(anchor, 0.5, SCORES, MASK)
