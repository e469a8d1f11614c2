"""Credit of the tokens against a loop written from the definitions, in float64."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from kedge.objective import Anchor, PolicyLoss, TrustRegion
from kedge.rollout import Rollout
from kedge.training.config import AdvantageConfig, GaeConfig
from kedge.training.credit import Credit, Rewarded, critic_credit, group_credit

LENGTHS = [3, 1, 2, 2]
TOTAL = [2.0, -1.0, math.nan, 0.5]
FINISHED = [True, False, True, True]
BETA = 0.4
GENERATOR = torch.Generator().manual_seed(5)
COUNT = sum(LENGTHS)
LOG_PROB, REFERENCE, VALUES = (
    -torch.rand(COUNT, generator=GENERATOR, dtype=torch.float64) * 3,
    -torch.rand(COUNT, generator=GENERATOR, dtype=torch.float64) * 3,
    torch.randn(COUNT, generator=GENERATOR, dtype=torch.float64),
)


def rewarded(*, kl_in_reward: bool, masked: int | None = None) -> Rewarded:
    mask = torch.ones(COUNT, dtype=torch.bool)
    if masked is not None:
        mask[masked] = False
    rollout = Rollout(
        prompt_tokens=torch.tensor([1, 2, 3]),
        prompt_lengths=torch.tensor([1, 2]),
        response_tokens=torch.arange(COUNT),
        response_lengths=torch.tensor(LENGTHS),
        group=torch.tensor([0, 0, 1, 1]),
        mask=mask,
        sampler_log_probs=LOG_PROB,
        finished=torch.tensor(FINISHED),
    )
    anchor = (
        Anchor("k1", placement="reward", gradient="published")
        if kl_in_reward
        else Anchor("exact", gradient="sequence")
    )
    total = torch.tensor(TOTAL, dtype=torch.float64)
    return Rewarded(
        rollout=rollout,
        total=total,
        learn=~total.isnan(),
        old={"log_prob": LOG_PROB, "reference.log_prob": REFERENCE},
        loss=PolicyLoss(TrustRegion("clip"), anchor, beta=BETA),
    )


def by_hand(config: GaeConfig, *, kl_in_reward: bool) -> tuple[list[float], list[float]]:
    """Advantages as the λ-weighted sum of surprises, returns as advantages and values; 0 where not scorable."""
    advantages: list[float] = []
    start = 0
    for length, reward in zip(LENGTHS, TOTAL, strict=True):
        for t in range(length):
            if math.isnan(reward):
                advantages.append(0.0)
                continue
            found = 0.0
            for u in range(t, length):
                here = reward if u == length - 1 else 0.0
                if kl_in_reward:
                    here -= BETA * float(LOG_PROB[start + u] - REFERENCE[start + u])
                following = float(VALUES[start + u + 1]) if u + 1 < length else 0.0
                surprise = here + config.discount * following - float(VALUES[start + u])
                found += (config.discount * config.trace) ** (u - t) * surprise
            advantages.append(found)
        start += length
    return advantages, [a + float(v) for a, v in zip(advantages, VALUES, strict=True)]


@pytest.mark.parametrize("kl_in_reward", [False, True])
@pytest.mark.parametrize(
    "config",
    [GaeConfig(whiten=False), GaeConfig(discount=0.9, trace=0.5, whiten=False)],
    ids=["usual", "short"],
)
def test_critic_credit(config: GaeConfig, kl_in_reward: bool) -> None:
    credit = critic_credit(config, rewarded(kl_in_reward=kl_in_reward), VALUES)
    advantages, returns = by_hand(config, kl_in_reward=kl_in_reward)
    assert credit.advantages.tolist() == pytest.approx(advantages, abs=1e-12)
    assert credit.returns is not None
    assert credit.returns.tolist() == pytest.approx(returns, abs=1e-12)
    scored = [index for index, value in enumerate(advantages) if index not in (4, 5)]
    assert credit.metrics["critic/return_mean"] == pytest.approx(
        sum(returns[i] for i in scored) / len(scored)
    )


def test_with_trace_1_the_return_is_what_came_of_it() -> None:
    """γ = λ = 1: whatever the critic says, the return is the reward to come."""
    credit = critic_credit(GaeConfig(trace=1.0), rewarded(kl_in_reward=False), VALUES)
    assert credit.returns is not None
    assert credit.returns[:4].tolist() == pytest.approx([2.0, 2.0, 2.0, -1.0])


def test_whitening_is_over_all_tokens_learnt_from() -> None:
    raw = critic_credit(GaeConfig(whiten=False), rewarded(kl_in_reward=True, masked=1), VALUES)
    white = critic_credit(GaeConfig(), rewarded(kl_in_reward=True, masked=1), VALUES)
    used = torch.tensor([True, False, True, True, False, False, True, True])
    kept = white.advantages[used]
    assert float(kept.mean()) == pytest.approx(0, abs=1e-12)
    assert float(kept.square().mean()) == pytest.approx(1)
    assert white.advantages[~used].tolist() == [0.0, 0.0, 0.0]
    expected = (raw.advantages[used] - raw.advantages[used].mean()) / raw.advantages[used].std(correction=0)
    assert kept.tolist() == pytest.approx(expected.tolist())
    assert torch.equal(white.returns, raw.returns) if white.returns is not None else False


def test_group_credit_spreads_the_response_s_advantage() -> None:
    credit: Credit = group_credit(AdvantageConfig(kind="mean"), rewarded(kl_in_reward=False))
    assert credit.advantages.tolist() == [1.5, 1.5, 1.5, -1.5, 0.0, 0.0, 0.0, 0.0]
    assert credit.values is None
    assert credit.metrics["advantage/zero_fraction"] == 0.5


def test_a_response_that_is_left_out_teaches_nothing() -> None:
    given = rewarded(kl_in_reward=False)
    given = replace(given, learn=torch.tensor([True, False, False, False]))
    assert group_credit(AdvantageConfig(kind="mean"), given).metrics["advantage/zero_fraction"] == 0.75


def test_group_credit_takes_the_kl_of_the_whole_response() -> None:
    credit = group_credit(AdvantageConfig(kind="mean"), rewarded(kl_in_reward=True))
    k1 = (LOG_PROB - REFERENCE).tolist()
    first, second = 2.0 - BETA * sum(k1[:3]), -1.0 - BETA * k1[3]
    assert credit.advantages[0].item() == pytest.approx((first - second) / 2, abs=1e-14)
