"""What sets β: fixed, adaptive, or solved for from a budget of KL."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, Protocol, runtime_checkable

Unit = Literal["nats/token", "nats/response"]


@runtime_checkable
class Controller(Protocol):
    """Sets β from the KL(policy‖reference) that is measured after each step.

    ``unit`` says what ``update`` expects: ``nats/token`` is the sum over all response tokens of the batch
    divided by their number, ``nats/response`` the same sum divided by the number of responses.
    """

    unit: Unit

    @property
    def beta(self) -> float:
        """β for the next update, in reward per nat."""

    def update(self, kl: float, *, responses: int) -> float:
        """Take in the KL of a step, measured on ``responses`` responses; return the new β."""

    def state_dict(self) -> dict[str, float]:
        """Return what `load_state_dict` needs to go on exactly from here."""

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Go on from a `state_dict`."""


class Fixed:
    """A constant β.

    Args:
        beta: β ≥ 0, in reward per nat.
        unit: In which the KL is reported.

    Raises:
        ValueError: β is negative or not finite.

    >>> Fixed(0.1).update(5.0, responses=64)
    0.1
    """

    def __init__(self, beta: float, unit: Unit = "nats/token") -> None:
        self.beta = _at_least_zero("beta", beta)
        self.unit: Unit = unit

    def update(self, kl: float, *, responses: int) -> float:
        """Return β, whatever the KL."""
        return self.beta

    def state_dict(self) -> dict[str, float]:
        """Return β."""
        return {"beta": self.beta}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Take β from a `state_dict`."""
        self.beta = state["beta"]


class Adaptive:
    """Proportional control of β on the relative error, in limited steps.

        β ← β·(1 + clip(KL/target − 1, −0.2, 0.2)·n/horizon)

    with n the responses since the last update (implementations differ: some count prompts, some steps).

    Args:
        beta: β > 0 at the start, in reward per nat.
        target: KL to hold, in ``unit``.
        horizon: Responses over which a β that errs by the limit would move by a fifth.
        unit: Of the target and of the KL.

    Raises:
        ValueError: β, target or horizon is not above 0, or not finite.

    Source: Ziegler et al. 2019, arXiv 1909.08593, section 2.2.

    >>> round(Adaptive(beta=0.1, target=6.0, horizon=1000, unit="nats/response").update(12.0, responses=500), 6)
    0.11
    """

    LIMIT = 0.2

    def __init__(self, beta: float, target: float, horizon: float, unit: Unit = "nats/token") -> None:
        self.beta = _above_zero("beta", beta)
        self.target = _above_zero("target", target)
        self.horizon = _above_zero("horizon", horizon)
        self.unit: Unit = unit

    def update(self, kl: float, *, responses: int) -> float:
        """Take in the KL of a step; return the new β."""
        error = min(max(_kl(kl) / self.target - 1, -self.LIMIT), self.LIMIT)
        self.beta *= max(1 + error * responses / self.horizon, 0.0)
        return self.beta

    def state_dict(self) -> dict[str, float]:
        """Return β."""
        return {"beta": self.beta}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Take β from a `state_dict`."""
        self.beta = state["beta"]


class Budget:
    """The constraint KL ≤ budget itself: β is its dual variable, found by damped dual ascent on log β.

    The error is measured as a distance, d = √(KL/budget) (KL grows with the square of how far a policy has
    moved), smoothed to d̄ with speed v̄ a step::

        d̄ ← d̄ + LEVEL·(d − d̄)       v̄ ← v̄ + TREND·(d̄ − d̄_before − v̄)       m ← m + REST·(|v̄| − m)
        u = HORIZON·v̄ − min(1 − d̄, HORIZON/APPROACH)
        log β ← log β + clip(GAIN·u/(m + STILL), −FALL, +RISE),   then into [log low, log high]

    The second term of u integrates the violation; the first damps it, so that β answers to where the KL is
    going. Below the budget the policy is let out at one budget in APPROACH steps at most, and β falls no further
    while it comes nearer at that pace: a slack constraint does not wind β down. At the bounds nothing is stored
    beyond log β, so β leaves them with the first sign. The gain falls with the restlessness m of the plant:
    slow and fast learners are held alike.

    Args:
        budget: How far the policy may go, in ``unit``.
        unit: Of the budget and of the KL.
        beta: β at the start, in reward per nat; the policy starts at the reference, so too high costs some
            steps and too low an overshoot.
        low: Lower bound of β; where β stays there the constraint is slack.
        high: Upper bound of β.

    Raises:
        ValueError: budget ≤ 0, or not 0 < low ≤ beta ≤ high.

    >>> controller = Budget(0.2, "nats/token")
    >>> start = controller.beta
    >>> max(controller.update(1.0, responses=64) for _ in range(3)) > start
    True
    """

    LEVEL = 0.5
    TREND = 0.3
    REST = 0.05
    HORIZON = 8.0
    APPROACH = 65.0
    GAIN = 0.004
    STILL = 0.006
    FALL = 0.1
    RISE = 0.2
    FARTHEST = 3.0

    def __init__(
        self,
        budget: float,
        unit: Unit = "nats/token",
        beta: float = 1.0,
        low: float = 1e-3,
        high: float = 1e3,
    ) -> None:
        self.budget = _above_zero("budget", budget)
        self.unit: Unit = unit
        self.low, self.high = _above_zero("low", low), _above_zero("high", high)
        if not low <= beta <= high:
            raise ValueError(f"β must start between its bounds {low:g} and {high:g}, got {beta:g}")
        self._log_beta = math.log(beta)
        self._distance = 0.0
        self._speed = 0.0
        self._restlessness = 0.0

    @property
    def beta(self) -> float:
        """β for the next update, in reward per nat."""
        return min(max(math.exp(self._log_beta), self.low), self.high)

    def update(self, kl: float, *, responses: int) -> float:
        """Take in the KL of a step; return the new β."""
        distance = min(math.sqrt(_kl(kl) / self.budget), self.FARTHEST)
        before = self._distance
        self._distance += self.LEVEL * (distance - before)
        self._speed += self.TREND * (self._distance - before - self._speed)
        self._restlessness += self.REST * (abs(self._speed) - self._restlessness)
        pull = self.HORIZON * self._speed - min(1 - self._distance, self.HORIZON / self.APPROACH)
        step = self.GAIN * pull / (self._restlessness + self.STILL)
        moved = self._log_beta + min(max(step, -self.FALL), self.RISE)
        self._log_beta = min(max(moved, math.log(self.low)), math.log(self.high))
        return self.beta

    def state_dict(self) -> dict[str, float]:
        """Return log β and the smoothed distance, speed and restlessness."""
        return {
            "log_beta": self._log_beta,
            "distance": self._distance,
            "speed": self._speed,
            "restlessness": self._restlessness,
        }

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Go on from a `state_dict`."""
        self._log_beta = state["log_beta"]
        self._distance = state["distance"]
        self._speed = state["speed"]
        self._restlessness = state["restlessness"]


def _above_zero(name: str, value: float) -> float:
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{name} must be a finite number above 0, got {value}")
    return float(value)


def _at_least_zero(name: str, value: float) -> float:
    if not (value >= 0 and math.isfinite(value)):
        raise ValueError(f"{name} must be a finite number of at least 0, got {value}")
    return float(value)


def _kl(value: float) -> float:
    """Refuse NaN, and round what a float's error has made negative up to 0."""
    if math.isnan(value):
        raise ValueError("the KL is NaN: a controller needs the measured KL of the step")
    return max(value, 0.0)
