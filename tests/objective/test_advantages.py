"""Advantages by hand, from an independent loop, and their laws."""

from __future__ import annotations

import itertools
import math
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kedge.objective import group_advantages, position_baseline, reward_to_go, whiten

NAN = math.nan
REWARDS = torch.tensor([1.0, 3.0, 2.0, 10.0, 30.0], dtype=torch.float64)
GROUP = torch.tensor([7, 7, 7, 2, 2])


def advantages(rewards: Tensor, group: Tensor, kind: str, **options: object) -> list[float]:
    return group_advantages(rewards, group, kind, **options).tolist()  # type: ignore[arg-type]


def test_group_by_hand() -> None:
    sample = [-1, 1, 0, -10 / math.sqrt(200), 10 / math.sqrt(200)]
    assert advantages(REWARDS, GROUP, "group", eps=0.0) == pytest.approx(sample, abs=1e-15)
    population = [-1 / math.sqrt(2 / 3), 1 / math.sqrt(2 / 3), 0, -1, 1]
    assert advantages(REWARDS, GROUP, "group", std="population", eps=0.0) == pytest.approx(
        population, abs=1e-15
    )
    assert advantages(REWARDS, GROUP, "group", std="population", eps=10.0)[-1] == pytest.approx(0.5)


def test_mean_and_leave_one_out_by_hand() -> None:
    assert advantages(REWARDS, GROUP, "mean") == [-1, 1, 0, -10, 10]
    assert advantages(REWARDS, GROUP, "leave_one_out") == [-1.5, 1.5, 0, -20, 20]


def test_batch_is_whitened_over_all_prompts() -> None:
    values = advantages(REWARDS, GROUP, "batch", eps=0.0)
    expected = (REWARDS - REWARDS.mean()) / REWARDS.std()
    assert values == pytest.approx(expected.tolist(), abs=1e-14)
    assert statistics.stdev(values) == pytest.approx(1.0)


@pytest.mark.parametrize("kind", ["group", "mean", "leave_one_out", "batch"])
def test_equal_rewards_give_exactly_zero(kind: str) -> None:
    for reward in (0.1, 1 / 3, 1e-30, 1e30):
        rewards = torch.full((7,), reward, dtype=torch.float32)
        assert advantages(rewards, torch.zeros(7, dtype=torch.int64), kind, eps=0.0) == [0.0] * 7


@pytest.mark.parametrize("kind", ["group", "mean", "leave_one_out", "batch"])
def test_unscorable_rewards_drop_out(kind: str) -> None:
    group = torch.tensor([0, 1, 0, 0, 1, 1])
    rewards = torch.tensor([1.0, 5.0, NAN, 3.0, 6.0, NAN], dtype=torch.float64)
    kept = ~rewards.isnan()
    values = group_advantages(rewards, group, kind)  # type: ignore[arg-type]
    assert values[~kept].tolist() == [0.0, 0.0]
    assert torch.equal(values[kept], group_advantages(rewards[kept], group[kept], kind))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["group", "mean", "leave_one_out", "batch"])
def test_one_or_no_scorable_response_gives_zero(kind: str) -> None:
    group = torch.zeros(3, dtype=torch.int64)
    assert advantages(torch.tensor([NAN, 5.0, NAN]), group, kind) == [0.0, 0.0, 0.0]
    assert advantages(torch.tensor([NAN] * 3), group, kind) == [0.0, 0.0, 0.0]
    assert advantages(torch.zeros(0), group[:0], kind) == []


def test_what_cannot_be_averaged_is_refused() -> None:
    with pytest.raises(ValueError, match="finite, or NaN"):
        advantages(torch.tensor([1.0, math.inf]), torch.tensor([0, 0]), "group")
    with pytest.raises(ValueError, match="eps must not be negative"):
        advantages(REWARDS, GROUP, "group", eps=-1.0)


labelled = st.lists(
    st.tuples(st.integers(-3, 3), st.sampled_from([0.0, 0.25, 1.0, -2.0, NAN])), min_size=1, max_size=12
)


@given(labelled, st.sampled_from(["mean", "leave_one_out", "group"]), st.randoms())
def test_against_a_plain_loop_in_any_order(rows: list[tuple[int, float]], kind: str, random: object) -> None:
    random.shuffle(rows)  # type: ignore[attr-defined]
    expected = []
    for label, reward in rows:
        mates = [r for other, r in rows if other == label and not math.isnan(r)]
        if math.isnan(reward) or len(set(mates)) < 2:
            expected.append(0.0)
            continue
        mean = sum(mates) / len(mates)
        scale = {"mean": 1.0, "leave_one_out": 1 - 1 / len(mates), "group": statistics.stdev(mates) + 1e-6}[
            kind
        ]
        expected.append((reward - mean) / scale)
    labels = torch.tensor([label for label, _ in rows])
    rewards = torch.tensor([reward for _, reward in rows], dtype=torch.float64)
    assert advantages(rewards, labels, kind) == pytest.approx(expected, abs=1e-9)


def test_reward_to_go_by_hand() -> None:
    values = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0], dtype=torch.float64)
    lengths = torch.tensor([3, 0, 2])
    assert reward_to_go(values, lengths, inclusive=True).tolist() == [7, 6, 4, 24, 16]
    assert reward_to_go(values, lengths, inclusive=False).tolist() == [6, 4, 0, 16, 0]


@given(st.lists(st.lists(st.floats(-5, 5), max_size=6), min_size=1, max_size=5))
def test_reward_to_go_against_a_plain_loop(responses: list[list[float]]) -> None:
    lengths = torch.tensor([len(response) for response in responses])
    values = torch.tensor(list(itertools.chain(*responses)), dtype=torch.float64)
    expected = [sum(response[t:]) for response in responses for t in range(len(response))]
    assert reward_to_go(values, lengths, inclusive=True).tolist() == pytest.approx(expected, abs=1e-12)
    later = [sum(response[t + 1 :]) for response in responses for t in range(len(response))]
    assert reward_to_go(values, lengths, inclusive=False).tolist() == pytest.approx(later, abs=1e-12)


def test_position_baseline_by_hand() -> None:
    to_go = torch.tensor([1.0, 2.0, 10.0, 5.0, 6.0, 7.0, 9.0], dtype=torch.float64)
    lengths, group = torch.tensor([2, 1, 3, 1]), torch.tensor([4, 4, 4, 0])
    expected = [(10 + 5) / 2, 6 / 2, (1 + 5) / 2, (1 + 10) / 2, 2 / 2, 0, 0]
    assert position_baseline(to_go, lengths, group).tolist() == expected


@given(st.integers(0, 5), st.floats(-100, 100))
def test_position_baseline_does_not_see_its_own_response(which: int, change: float) -> None:
    lengths, group = torch.tensor([3, 2, 1, 3, 2, 2]), torch.tensor([0, 0, 0, 1, 1, 0])
    to_go = torch.linspace(-1, 1, 13, dtype=torch.float64)
    mine = torch.repeat_interleave(torch.arange(6), lengths) == which
    changed = torch.where(mine, to_go + change, to_go)
    before, after = position_baseline(to_go, lengths, group), position_baseline(changed, lengths, group)
    assert after[mine].tolist() == pytest.approx(before[mine].tolist(), abs=1e-9)


def test_whitened_by_hand() -> None:
    values = torch.tensor([1.0, NAN, 5.0, 3.0, 1e9], dtype=torch.float64)
    mask = torch.tensor([True, False, True, True, False])
    found = whiten(values, mask)
    unit = math.sqrt(8 / 3)
    assert found.tolist() == pytest.approx([-2 / unit, 0, 2 / unit, 0, 0])
    parts = [
        whiten(values[rows], mask[rows], mean=3.0, std=unit).tolist() for rows in (slice(0, 2), slice(2, 5))
    ]
    assert parts[0] + parts[1] == pytest.approx(found.tolist())


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=30), st.floats(0.1, 10), st.floats(-10, 10))
def test_whitened_has_mean_zero_and_std_one_and_no_unit(
    values: list[float], scale: float, shift: float
) -> None:
    advantages = torch.tensor(values, dtype=torch.float64)
    mask = torch.ones(len(values), dtype=torch.bool)
    found = whiten(advantages, mask)
    if max(values) - min(values) < 1e-6:
        return
    assert found.mean().item() == pytest.approx(0.0, abs=1e-6)
    assert statistics.pstdev(found.tolist()) == pytest.approx(1.0)
    assert whiten(scale * advantages + shift, mask).tolist() == pytest.approx(found.tolist(), abs=1e-5)


def test_equal_advantages_whiten_to_exactly_zero() -> None:
    for value in (0.1, 1 / 3, 1e-30, 1e30):
        equal = torch.full((7,), value)
        assert whiten(equal, torch.ones(7, dtype=torch.bool)).tolist() == [0.0] * 7
    some = torch.tensor([1.0, 2.0])
    assert whiten(some, torch.tensor([False, False])).tolist() == [0.0, 0.0]
    assert whiten(some, torch.tensor([True, True]), mean=1.0, std=0.0).tolist() == [0.0, 0.0]
    with pytest.raises(ValueError, match="std must not be negative"):
        whiten(some, torch.tensor([True, True]), std=-1.0)


def test_a_nan_that_counts_is_not_hidden() -> None:
    assert whiten(torch.tensor([1.0, NAN, 2.0]), torch.ones(3, dtype=torch.bool)).isnan().all()
