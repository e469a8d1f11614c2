"""Controllers of β: their formulas by hand, their refusals, and the budget on simulated plants."""

from __future__ import annotations

import json
import math
import random

import pytest

from kedge.objective import Adaptive, Budget, Controller, Fixed, HalvingDoubling


def test_fixed_ignores_the_kl() -> None:
    controller = Fixed(0.3)
    assert [controller.update(kl, responses=8) for kl in (0.0, 1.0, 1e6)] == [0.3] * 3


def test_adaptive_by_hand() -> None:
    """Ziegler et al. 2019: β(1 + clip(KL/target − 1, ±0.2)·n/horizon)."""
    controller = Adaptive(beta=0.1, target=0.5, horizon=100.0, unit="nats/response")
    assert controller.update(0.55, responses=50) == pytest.approx(0.1 * (1 + 0.1 * 0.5))
    assert controller.update(5.0, responses=50) == pytest.approx(0.105 * (1 + 0.2 * 0.5))
    assert controller.update(0.0, responses=100) == pytest.approx(0.1155 * (1 - 0.2))


def test_halving_and_doubling_at_the_exact_thresholds() -> None:
    """Schulman et al. 2017: d < target/1.5 halves, d > 1.5·target doubles; at the thresholds β stays."""
    low, high = 0.3 / 1.5, 0.3 * 1.5
    controller = HalvingDoubling(beta=1.0, target=0.3)
    for kl, beta in (
        (low, 1.0),
        (high, 1.0),
        (0.3, 1.0),
        (math.nextafter(low, 0.0), 0.5),
        (0.0, 0.25),
        (math.nextafter(high, 1.0), 0.5),
        (1e9, 1.0),
        (math.inf, 2.0),
    ):
        assert controller.update(kl, responses=64) == controller.beta == beta


def test_halving_does_not_wind_down_without_end() -> None:
    controller = HalvingDoubling(beta=1.0, target=0.1)
    found = [controller.update(0.0, responses=1) for _ in range(2000)]
    assert found[-1] == found[20] == 2.0**-20
    bounded = HalvingDoubling(beta=1.0, target=0.1, low=0.4, high=1.5)
    assert [bounded.update(kl, responses=1) for kl in (0.0, 0.0, 1.0, 1.0)] == [0.5, 0.4, 0.8, 1.5]


def test_budget_by_hand() -> None:
    controller = Budget(0.2)
    first = math.log(0.1 / 0.2)
    assert controller.update(0.1, responses=1) == pytest.approx(math.exp(0.08 * first + first))
    second = first + 0.5 * (math.log(0.5 / 0.2) - first)
    integral = 0.08 * first + 0.08 * second
    assert controller.update(0.5, responses=1) == pytest.approx(math.exp(integral + second))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Fixed(-0.1),
        lambda: Fixed(math.nan),
        lambda: Adaptive(beta=0.1, target=0.0, horizon=1.0, unit="nats/token"),
        lambda: Adaptive(beta=0.1, target=0.1, horizon=0.0, unit="nats/token"),
        lambda: Adaptive(beta=-0.1, target=0.1, horizon=1.0, unit="nats/token"),
        lambda: HalvingDoubling(beta=0.0, target=0.1),
        lambda: HalvingDoubling(beta=-1.0, target=0.1),
        lambda: HalvingDoubling(beta=1.0, target=0.0),
        lambda: HalvingDoubling(beta=1.0, target=-0.1),
        lambda: HalvingDoubling(beta=1.0, target=math.nan),
        lambda: HalvingDoubling(beta=1.0, target=0.1, low=2.0),
        lambda: Budget(0.0),
        lambda: Budget(-1.0),
        lambda: Budget(0.1, beta=0.0),
        lambda: Budget(0.1, low=2.0, beta=1.0),
        lambda: Budget(0.1, high=math.inf),
    ],
)
def test_refused(make: object) -> None:
    with pytest.raises(ValueError):
        make()  # type: ignore[operator]


def test_no_step_may_take_an_adaptive_beta_to_zero() -> None:
    controller = Adaptive(beta=0.1, target=0.1, horizon=10.0, unit="nats/token")
    assert controller.update(0.0, responses=49) == pytest.approx(0.1 * 0.02)
    with pytest.raises(ValueError, match="must be above 10 where a step has 50"):
        controller.update(0.0, responses=50)
    assert controller.beta > 0


def test_a_nan_kl_is_refused() -> None:
    with pytest.raises(ValueError, match="the KL is NaN"):
        Budget(0.1).update(math.nan, responses=1)
    with pytest.raises(ValueError, match="the KL is NaN"):
        HalvingDoubling(beta=1.0, target=0.1).update(math.nan, responses=1)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Fixed(0.1),
        lambda: Adaptive(beta=0.1, target=0.1, horizon=10.0, unit="nats/token"),
        lambda: HalvingDoubling(beta=1.0, target=0.4),
        lambda: Budget(0.1),
    ],
)
def test_state_goes_through_json_and_on_exactly(make: object) -> None:
    draw = random.Random(0)
    whole: Controller = make()  # type: ignore[operator]
    other: Controller = make()  # type: ignore[operator]
    other.load_state_dict(json.loads(json.dumps(whole.state_dict())))
    for _ in range(20):
        whole.update(draw.random(), responses=4)
    other.load_state_dict(json.loads(json.dumps(whole.state_dict())))
    for _ in range(5):
        kl = draw.random()
        assert whole.update(kl, responses=4) == other.update(kl, responses=4)


def plant(
    controller: Controller, *, steps: int, fast: float, power: float, noise: float, seed: int
) -> list[float]:
    """A policy whose KL goes, with a lag, to where the reward's pull and β balance.

    Without an anchor its distance √KL grows by the same amount each step, so that it passes the budget of 0.2
    after ``fast`` steps; the balance is at KL = 0.2·(0.3/β)^power; the measured KL is off by ``noise``.
    """
    draw = random.Random(seed)
    distance, seen = 0.0, []
    for _ in range(steps):
        seen.append(distance**2 * math.exp(noise * draw.gauss(0, 1)))
        beta = max(controller.update(seen[-1], responses=64), 1e-9)
        balance = math.sqrt(0.2 * (0.3 / beta) ** power)
        most = math.sqrt(0.2) / fast
        distance = max(0.0, distance + max(-most, min(most, 0.15 * (balance - distance))))
    return seen


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("power", [1.0, 2.0])
@pytest.mark.parametrize("fast", [5.0, 20.0])
def test_a_budget_is_held(fast: float, power: float, seed: int) -> None:
    kl = plant(Budget(0.2), steps=120, fast=fast, power=power, noise=0.2, seed=seed)
    last = kl[-30:]
    assert 0.9 * 0.2 <= sum(last) / 30 <= 1.1 * 0.2
    windows = [sum(kl[i : i + 10]) / 10 for i in range(len(kl) - 9)]
    assert max(windows) <= 1.3 * 0.2


def test_a_fixed_beta_does_not_hold_it() -> None:
    """The plant is no gift: a β that is wrong by 3 misses the budget by far."""
    kl = plant(Fixed(0.1), steps=120, fast=20.0, power=2.0, noise=0.2, seed=0)
    assert sum(kl[-30:]) / 30 > 2 * 0.2


def test_slack_does_not_wind_up() -> None:
    """After any time at the lower bound, a sudden violation raises β as fast as after a short one."""
    waits = []
    for slack in (200, 2000):
        controller = Budget(0.2, low=0.01)
        for _ in range(slack):
            controller.update(0.01, responses=64)
        assert controller.beta == pytest.approx(0.01)
        steps = 0
        while controller.beta < 0.3:
            controller.update(0.8, responses=64)
            steps += 1
        waits.append(steps)
    assert waits[0] == waits[1]
    assert waits[0] <= 15
