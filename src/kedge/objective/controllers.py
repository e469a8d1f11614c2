"""What sets β: fixed, adaptive, halved or doubled, or solved for from a budget of KL."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar, Literal, Protocol, runtime_checkable

Unit = Literal["nats/token", "nats/response"]


@runtime_checkable
class Controller(Protocol):
    """Sets β from the KL that it weighs: KL(policy‖reference), for a penalty KL(old‖policy).

    The first is measured on a step's responses, as the policy wrote them, and β then serves the next step; the second
    after the step's updates.

    ``unit`` says what ``update`` expects: ``nats/token`` is the sum over all response tokens of the batch
    divided by their number, ``nats/response`` the same sum divided by the number of responses.
    """

    unit: Unit

    @property
    def beta(self) -> float:
        """β for the next update, in units of the advantage per nat."""

    def update(self, kl: float, *, responses: int) -> float:
        """Take in the KL of a step, measured on ``responses`` responses; return the new β."""

    def state_dict(self) -> dict[str, float]:
        """Return what `load_state_dict` needs to go on exactly from here."""

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Go on from a `state_dict`."""


class Fixed:
    """A constant β.

    Args:
        beta: β ≥ 0, in units of the advantage per nat.
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
        """Return nothing: β is a setting, and whoever changes it means what goes on from here."""
        return {}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Keep β."""


class Adaptive:
    """Proportional control of β on the relative error, in limited steps.

        β ← β·(1 + clip(KL/target − 1, −0.2, 0.2)·n/horizon)

    with n the responses since the last update (implementations differ: some count prompts, some steps).

    Args:
        beta: β > 0 at the start, in units of the advantage per nat.
        target: KL to hold, in ``unit``.
        horizon: Responses over which a β that errs by the limit would move by a fifth.
        unit: Of the target and of the KL.

    Raises:
        ValueError: β, target or horizon is not above 0, or not finite; or, from ``update``, the horizon is so short
            that one step could take β to 0.

    Source: Ziegler et al. 2019, arXiv 1909.08593, section 2.2.

    >>> round(Adaptive(beta=0.1, target=6.0, horizon=1000.0, unit="nats/response").update(12.0, responses=500), 6)
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
        if responses * self.LIMIT >= self.horizon:
            raise ValueError(self.too_short(responses))
        error = min(max(_kl(kl) / self.target - 1, -self.LIMIT), self.LIMIT)
        self.beta *= 1 + error * responses / self.horizon
        return self.beta

    @classmethod
    def too_short(cls, responses: int) -> str:
        """Say how long the horizon must be for a step of so many responses: β would not come back from 0."""
        return (
            f"horizon counts responses and must be above {cls.LIMIT * responses:g} where a step has {responses}: one "
            "step may take β to 0 otherwise, where it stays"
        )

    def state_dict(self) -> dict[str, float]:
        """Return β."""
        return {"beta": self.beta}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Take β from a `state_dict`."""
        self.beta = state["beta"]


class HalvingDoubling:
    """PPO-Penalty's rule: β is halved where an update went less far than wanted, doubled where it went further.

        β ← β/2  if KL < target/1.5        β ← 2β  if KL > 1.5·target        β otherwise

    KL is that of old and updated policy, KL(old‖policy), after the updates on one batch of responses. β stays
    within [low, high]: an update that cannot use its target up does not wind β down without end.

    Args:
        beta: β > 0 at the start, in units of the advantage per nat.
        target: KL > 0 that each policy update is to use, in ``unit``.
        unit: Of the target and of the KL.
        low: Lower bound of β, beta/2²⁰ when left out.
        high: Upper bound of β, 2²⁰·beta when left out.

    Raises:
        ValueError: β or target is not above 0, or not finite, or not 0 < low ≤ beta ≤ high.

    Source: Schulman et al. 2017, arXiv 1707.06347, section 4; the bounds are Kedge's.

    >>> controller = HalvingDoubling(beta=1.0, target=0.3)
    >>> [controller.update(kl, responses=64) for kl in (0.1, 0.3, 0.5)]
    [0.5, 0.5, 1.0]
    """

    MARGIN = 1.5
    REACH = 2.0**20

    def __init__(
        self,
        beta: float,
        target: float,
        unit: Unit = "nats/token",
        low: float | None = None,
        high: float | None = None,
    ) -> None:
        self.beta = _above_zero("beta", beta)
        self.target = _above_zero("target", target)
        self.unit: Unit = unit
        self.low, self.high = _bounds(self.beta, low, high, self.REACH)

    def update(self, kl: float, *, responses: int) -> float:
        """Take in KL(old‖policy) after the updates of a step; return the new β."""
        kl = _kl(kl)
        if kl < self.target / self.MARGIN:
            self.beta = max(self.beta / 2, self.low)
        elif kl > self.target * self.MARGIN:
            self.beta = min(self.beta * 2, self.high)
        return self.beta

    def state_dict(self) -> dict[str, float]:
        """Return β."""
        return {"beta": self.beta}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Take β from a `state_dict`."""
        self.beta = state["beta"]


class Budget:
    """The constraint KL ≤ budget itself: β is its dual variable, found by damped dual ascent on log β.

    With the violation e = log(KL/budget), held within [LEAST, MOST] and smoothed to ē::

        ē ← ē + SMOOTHING·(e − ē)
        I ← I + ASCENT·ē + RESCUE·max(0, ē − 1/4),   within [log low, log high]
        log β = I + DAMPING·ē,                        within [log low, log high]

    I is the dual ascent: at rest KL = budget, whatever the β that takes. The damping term answers at once: it
    lets the policy out while it is far below its budget and brakes it as it comes near. The rescue term hurries
    where the KL is well above. A constraint that stays slack takes β to its lower bound and no further: nothing
    is stored beyond the bounds. The gains suit policies that need some ten steps or more to use their budget up.

    Args:
        budget: How far the policy may go, in ``unit``.
        unit: Of the budget and of the KL.
        beta: exp(I) at the start, in units of the advantage per nat; 1 for nats/token and 0.1 for nats/response when
            left out.
        low: Lower bound of β, beta/100 when left out; where β stays there the constraint is slack.
        high: Upper bound of β, 100·beta when left out.

    Raises:
        ValueError: budget ≤ 0, or not 0 < low ≤ beta ≤ high.

    Source: a proportional–integral multiplier; Stooke, Achiam, Abbeel 2020, arXiv 2007.03964.

    >>> controller = Budget(0.2, "nats/token")
    >>> [round(controller.update(kl, responses=64), 3) for kl in (0.0, 0.2, 0.8)]
    [0.34, 0.538, 1.459]
    """

    SMOOTHING = 0.5
    ASCENT = 0.08
    DAMPING = 1.0
    RESCUE = 0.1
    LEAST, MOST = -1.0, 1.5
    START: ClassVar[Mapping[Unit, float]] = {"nats/token": 1.0, "nats/response": 0.1}

    def __init__(
        self,
        budget: float,
        unit: Unit = "nats/token",
        beta: float | None = None,
        low: float | None = None,
        high: float | None = None,
    ) -> None:
        self.budget = _above_zero("budget", budget)
        self.unit: Unit = unit
        beta = self.START[unit] if beta is None else _above_zero("beta", beta)
        self.low, self.high = _bounds(beta, low, high, 100.0)
        self._integral = math.log(beta)
        self._violation: float | None = None

    @property
    def beta(self) -> float:
        """β for the next update, in units of the advantage per nat."""
        return math.exp(self._bounded(self._integral + self.DAMPING * (self._violation or 0.0)))

    def update(self, kl: float, *, responses: int) -> float:
        """Take in the KL of a step; return the new β."""
        ratio = max(_kl(kl) / self.budget, math.exp(self.LEAST))
        violation = min(math.log(ratio), self.MOST)
        before = violation if self._violation is None else self._violation
        self._violation = before + self.SMOOTHING * (violation - before)
        rescue = self.RESCUE * max(0.0, self._violation - 0.25)
        self._integral = self._bounded(self._integral + self.ASCENT * self._violation + rescue)
        return self.beta

    def _bounded(self, log_beta: float) -> float:
        return min(max(log_beta, math.log(self.low)), math.log(self.high))

    def state_dict(self) -> dict[str, float]:
        """Return the integral and, after the first step, the smoothed violation."""
        state = {"integral": self._integral}
        return state if self._violation is None else {**state, "violation": self._violation}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Go on from a `state_dict`."""
        self._integral, self._violation = state["integral"], state.get("violation")


def _bounds(beta: float, low: float | None, high: float | None, reach: float) -> tuple[float, float]:
    """Return the bounds of β; those that are left out lie ``reach`` times below and above its start."""
    lowest = _above_zero("low", beta / reach if low is None else low)
    highest = _above_zero("high", beta * reach if high is None else high)
    if not lowest <= beta <= highest:
        raise ValueError(f"β must start between its bounds {lowest:g} and {highest:g}, got {beta:g}")
    return lowest, highest


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
