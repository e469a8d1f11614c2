"""How a failed reward is reported."""

from __future__ import annotations

from kedge.errors import RunError


class RewardError(RunError):
    """A reward function failed.

    Attributes:
        reward: its name.
        sample: index of the response in the batch, where it is known.
        traceback: the function's own traceback as text, for the log; empty where it did not raise.
    """

    def __init__(self, message: str, reward: str, *, sample: int | None = None, traceback: str = "") -> None:
        super().__init__(message)
        self.reward = reward
        self.sample = sample
        self.traceback = traceback


class RewardTimeoutError(RewardError):
    """A reward function did not return within the time limit."""
