"""Generalised advantages by hand, from their definition as a sum, and their laws."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kedge.objective import gae, reward_to_go, terminal_rewards

NAN = math.nan
NUMBERS = st.floats(-5, 5)
RESPONSES = st.lists(st.lists(st.tuples(NUMBERS, NUMBERS), max_size=6), min_size=1, max_size=5)
SHARE = st.floats(0, 1)


def packed(responses: list[list[tuple[float, float]]]) -> tuple[Tensor, Tensor, Tensor]:
    tokens = list(itertools.chain(*responses))
    rewards, values = torch.tensor(tokens, dtype=torch.float64).reshape(-1, 2).unbind(1)
    return rewards, values, torch.tensor([len(response) for response in responses])


def test_by_hand() -> None:
    rewards, values, lengths = packed([[(1.0, 0.5), (0.0, 2.0), (4.0, 1.0)], [(3.0, 1.0)]])
    # δ = 1 + ½·2 − ½, 0 + ½·1 − 2, 4 − 1 and 3 − 1; γλ = ¼
    expected = [1.5 - 1.5 / 4 + 3 / 16, -1.5 + 3 / 4, 3.0, 2.0]
    assert gae(rewards, values, lengths, discount=0.5, trace=0.5).tolist() == expected


@given(RESPONSES, SHARE.filter(bool), SHARE)
def test_against_the_sum_that_defines_it(
    responses: list[list[tuple[float, float]]], discount: float, trace: float
) -> None:
    """A_t = Σ_l (γλ)^l δ_{t+l}, each sum by itself."""
    expected = []
    for response in responses:
        values = [*(value for _, value in response), 0.0]
        surprise = [r + discount * values[t + 1] - values[t] for t, (r, _) in enumerate(response)]
        expected += [
            sum((discount * trace) ** (u - t) * surprise[u] for u in range(t, len(response)))
            for t in range(len(response))
        ]
    found = gae(*packed(responses), discount=discount, trace=trace)
    assert found.tolist() == pytest.approx(expected, abs=1e-10)


@given(RESPONSES)
def test_its_two_ends(responses: list[list[tuple[float, float]]]) -> None:
    """λ = 1: the reward-to-go minus the value, whatever the critic says of what follows. λ = 0: δ."""
    rewards, values, lengths = packed(responses)
    whole = gae(rewards, values, lengths, trace=1.0)
    to_go = reward_to_go(rewards, lengths, inclusive=True)
    assert whole.tolist() == pytest.approx((to_go - values).tolist(), abs=1e-12)
    step = gae(rewards, values, lengths, trace=0.0)
    following = reward_to_go(values, lengths, inclusive=False) - reward_to_go(
        torch.cat([values[1:], values.new_zeros(1)])[: len(values)] * _not_last(lengths),
        lengths,
        inclusive=False,
    )
    assert step.tolist() == pytest.approx((rewards + following - values).tolist(), abs=1e-12)


def _not_last(lengths: Tensor) -> Tensor:
    """Return 1 for each token that another follows in its response."""
    last = torch.zeros(int(lengths.sum()), dtype=torch.float64)
    last[lengths[lengths > 0].cumsum(0) - 1] = 1
    return 1 - last


def test_a_right_critic_makes_every_trace_the_same() -> None:
    """Where V_t is what follows, every δ is 0 but for what the last reward brings."""
    rewards, lengths = torch.tensor([0.0, 0.0, 5.0], dtype=torch.float64), torch.tensor([3])
    values = torch.tensor([5.0, 5.0, 5.0], dtype=torch.float64)
    for trace in (0.0, 0.5, 1.0):
        assert gae(rewards, values, lengths, trace=trace).tolist() == [0.0, 0.0, 0.0]


def test_what_could_not_be_scored_drops_out() -> None:
    rewards = torch.tensor([0.0, NAN, 0.0, 2.0], dtype=torch.float64)
    values = torch.tensor([1.0, 2.0, 0.5, 0.5], dtype=torch.float64)
    found = gae(rewards, values, torch.tensor([2, 2]), trace=1.0)
    assert found.tolist() == [0.0, 0.0, 1.5, 1.5]


def test_a_broken_critic_is_not_hidden() -> None:
    rewards, values = torch.zeros(3), torch.tensor([0.0, NAN, 1.0])
    assert gae(rewards, values, torch.tensor([2, 1])).isnan().tolist() == [True, True, False]


def test_a_response_without_tokens_has_none() -> None:
    nothing = torch.zeros(0, dtype=torch.float64)
    assert gae(nothing, nothing, torch.tensor([0, 0])).tolist() == []
    rewards, values, lengths = packed([[], [(1.0, 0.0)]])
    assert gae(rewards, values, lengths).tolist() == [1.0]


def test_nothing_is_differentiated() -> None:
    values = torch.zeros(2, requires_grad=True)
    assert not gae(torch.ones(2), values, torch.tensor([2])).requires_grad


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"discount": 0.0}, "discount must be above 0"),
        ({"discount": 1.1}, "discount must be above 0 and at most 1, got 1.1"),
        ({"trace": -0.1}, "trace must be from 0 to 1"),
        ({"trace": NAN}, "trace must be from 0 to 1"),
    ],
)
def test_what_is_out_of_range_is_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gae(torch.zeros(2), torch.zeros(2), torch.tensor([2]), **options)


def test_terminal_rewards() -> None:
    found = terminal_rewards(torch.tensor([3.0, NAN, 5.0]), torch.tensor([2, 1, 3]))
    assert found[[0, 1, 3, 4, 5]].tolist() == [0.0, 3.0, 0.0, 0.0, 5.0]
    assert math.isnan(found[2])
    with pytest.raises(ValueError, match="no last token"):
        terminal_rewards(torch.ones(2), torch.tensor([1, 0]))
