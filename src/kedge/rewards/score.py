"""Scoring responses by several weighted reward functions."""

from __future__ import annotations

import inspect
import math
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from kedge.errors import KedgeError, UserError
from kedge.rewards.check import ON_REQUEST, RESERVED, accepted_columns, checked_values
from kedge.rewards.failure import RewardError, RewardTimeoutError
from kedge.rewards.limit import TimedOut, call

_TAKEN = frozenset({"total", "mean", "std", "unscorable_fraction"})
"""Names that the sum of all rewards has in batches, metrics and samples."""


class WeightedReward(NamedTuple):
    """A reward function under the name that its metrics have."""

    name: str
    function: Callable[..., Any]
    weight: float
    timed: bool = True
    """Whether the time limit holds for it; a model of our own does not hang."""


@dataclass(frozen=True)
class RewardResult:
    """Rewards of R responses; NaN stands for unscorable."""

    total: list[float]
    """Weighted sum over the functions that scored the response; NaN where none did, or one failed on it."""
    by_name: dict[str, list[float]]
    """Of each function, unweighted."""
    dropped: list[RewardError]
    """With ``on_error="drop"``: the failures, each with its function and sample."""


class RewardSet:
    """Several reward functions, run safely.

    A response's reward is the weighted sum of what the functions give it:

        total_r = Σ_k weight_k · reward_k(r)   over the k that scored r

    A function that returns None for a response does not judge it (as in TRL); a response that no function
    with a weight judges is unscorable. A weight of 0 measures without rewarding.

    Args:
        rewards: (name, function, weight) each, or a `WeightedReward`; functions are called as
            ``function(prompts=…, completions=…, **columns)`` and return one number (or None) a response.
        time_limit: seconds for one call; None: no limit.
        on_error: "stop" raises; "drop" scores the batch one by one and counts what fails as unscorable.
        max_consecutive_drops: with "drop", this many calls of `score` in a row with a failure stop the
            run; so do this many responses in a row on which a function hangs.

    Raises:
        UserError: no functions, two of one name, all weights 0, or one that cannot be a reward.

    >>> from kedge.rewards import RewardSet
    >>> def brevity(prompts, completions, **_):
    ...     return [-float(len(text)) for text in completions]
    >>> RewardSet([("brevity", brevity, 0.5)]).score(["a", "a"], ["abc", ""]).total
    [-1.5, 0.0]
    """

    def __init__(
        self,
        rewards: Iterable[WeightedReward | tuple[str, Callable[..., Any], float]],
        time_limit: float | None = None,
        on_error: Literal["stop", "drop"] = "stop",
        max_consecutive_drops: int = 8,
    ) -> None:
        self.rewards = [WeightedReward(*reward) for reward in rewards]
        self.time_limit = time_limit
        self.on_error = on_error
        self.max_consecutive_drops = max_consecutive_drops
        self._failed_in_a_row = 0
        self._check()

    def apart(self) -> RewardSet:
        """Give the same functions and rules, with a count of failures in a row of its own."""
        return RewardSet(self.rewards, self.time_limit, self.on_error, self.max_consecutive_drops)

    @property
    def names(self) -> list[str]:
        """The functions' names."""
        return [reward.name for reward in self.rewards]

    def check_columns(self, columns: Iterable[str]) -> None:
        """Make sure that the data have every column the functions need, before anything is generated.

        Raises:
            UserError: one is missing.
        """
        known = [*(column for column in columns if column not in RESERVED), *ON_REQUEST]
        for reward in self.rewards:
            accepted_columns(reward.name, reward.function, known)

    def score(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        columns: Mapping[str, Sequence[Any]] | None = None,
    ) -> RewardResult:
        """Score a batch of R responses.

        Args:
            prompts: R texts, or R message lists.
            completions: the same of the responses, without special tokens.
            columns: R values of each other column of the data, and of what functions may ask for (`ON_REQUEST`).

        Returns:
            Totals and values, R each.

        Raises:
            RewardError: a function raised, hung, or returned something else than R finite numbers.
            UserError: a function needs a column that is not there.
        """
        batch = _Batch(list(prompts), list(completions), {k: list(v) for k, v in (columns or {}).items()})
        by_name: dict[str, list[float]] = {}
        dropped: list[RewardError] = []
        for reward in self.rewards:
            try:
                by_name[reward.name] = self._call(reward, batch)
            except RewardError:
                if self.on_error == "stop":
                    raise
                by_name[reward.name], failures = self._one_by_one(reward, batch)
                dropped += failures
        self._count(dropped)
        failed = {error.sample for error in dropped}
        total = [math.nan if r in failed else self._total(by_name, r) for r in range(len(batch.completions))]
        return RewardResult(total, by_name, dropped)

    def state_dict(self) -> dict[str, int]:
        """Give what a resumed run needs: how many calls in a row had a failure."""
        return {"failed_in_a_row": self._failed_in_a_row}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Take up `state_dict`."""
        self._failed_in_a_row = state["failed_in_a_row"]

    def _check(self) -> None:
        if not self.rewards:
            raise UserError("no reward function; name at least one")
        twice = {name for name in self.names if self.names.count(name) > 1}
        if twice:
            raise UserError(f"two rewards are called {min(twice)!r}; give one of them another name")
        for name, function, weight, _ in self.rewards:
            if name in _TAKEN or name.endswith("_se"):
                raise UserError(
                    f"reward {name!r}: metrics of all rewards together, and standard errors (…_se), have names like "
                    "this; give it another by `name`"
                )
            if not callable(function):
                raise UserError(f"reward {name!r} is a {type(function).__name__}, not a function")
            if inspect.iscoroutinefunction(function):
                raise UserError(
                    f"reward {name!r} is async; make it an ordinary function (asyncio.run inside it)"
                )
            if not math.isfinite(weight):
                raise UserError(f"reward {name!r}: its weight is {weight}, which is not a finite number")
        if all(reward.weight == 0 for reward in self.rewards):
            raise UserError("every reward has weight 0, so there is nothing to learn; give one a weight")
        if self.time_limit is not None and not self.time_limit > 0:
            raise UserError(f"time_limit must be positive (seconds), not {self.time_limit}")
        if self.max_consecutive_drops < 1:
            raise UserError(f"max_consecutive_drops must be at least 1, not {self.max_consecutive_drops}")

    def _call(self, reward: WeightedReward, batch: _Batch) -> list[float]:
        name, function, _, timed = reward
        columns = {key: batch.columns[key] for key in accepted_columns(name, function, batch.columns)}
        try:
            returned = call(
                lambda: function(prompts=batch.prompts, completions=batch.completions, **columns),
                self.time_limit if timed else None,
            )
        except TimedOut as error:
            raise _hung(name, self.time_limit, error) from None
        except KedgeError:
            raise
        except (Exception, SystemExit) as error:
            alarm = "signal only works in main thread" in str(error) and self.time_limit is not None
            raise RewardError(
                f"reward {name!r} raised {type(error).__name__}: {error}"
                + (_NEEDS_MAIN_THREAD if alarm else ""),
                name,
                traceback="".join(traceback.format_exception(error)),
            ) from error
        return checked_values(name, returned, batch.prompts, batch.completions)

    def _one_by_one(self, reward: WeightedReward, batch: _Batch) -> tuple[list[float], list[RewardError]]:
        """Find the responses that a function fails on."""
        values, failures, hung = [], [], 0
        for index in range(len(batch.completions)):
            try:
                values += self._call(reward, batch.only(index))
                hung = 0
            except RewardError as error:
                error.sample = index
                values.append(math.nan)
                failures.append(error)
                hung = hung + 1 if isinstance(error, RewardTimeoutError) else 0
                if hung == self.max_consecutive_drops:
                    raise
        return values, failures

    def _count(self, dropped: list[RewardError]) -> None:
        self._failed_in_a_row = self._failed_in_a_row + 1 if dropped else 0
        if dropped and self._failed_in_a_row >= self.max_consecutive_drops:
            last = dropped[-1]
            raise RewardError(
                f"reward {last.reward!r} failed in {self._failed_in_a_row} batches in a row, as many as "
                f"max_consecutive_drops allows; the last time: {last}",
                last.reward,
                sample=last.sample,
                traceback=last.traceback,
            )

    def _total(self, by_name: Mapping[str, Sequence[float]], r: int) -> float:
        judged = [w for w in self.rewards if w.weight != 0 and not math.isnan(by_name[w.name][r])]
        return sum(w.weight * by_name[w.name][r] for w in judged) if judged else math.nan


_NEEDS_MAIN_THREAD = (
    ". It limits its time by a signal, which a function with a limit of Kedge's, in a thread, cannot: set "
    "rewards.time_limit: null"
)


@dataclass(frozen=True)
class _Batch:
    prompts: list[Any]
    completions: list[Any]
    columns: dict[str, list[Any]]

    def only(self, index: int) -> _Batch:
        """Give a batch of one response."""
        columns = {name: [values[index]] for name, values in self.columns.items()}
        return _Batch([self.prompts[index]], [self.completions[index]], columns)


def _hung(name: str, limit: float | None, error: TimedOut) -> RewardTimeoutError:
    left = "" if error.ended else "; it could not be interrupted and is left behind in its thread"
    return RewardTimeoutError(
        f"reward {name!r} did not return within its time limit of {limit:g} s{left}; make it faster, or "
        "raise rewards.time_limit",
        name,
    )
