"""Groups of responses, packed as training packs them: all that there are, or some that were drawn."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kedge.certify.judge.task import Task
from kedge.head import Head
from kedge.objective import aggregation_weights
from kedge.objective.aggregate import Mode, spread


@dataclass(frozen=True)
class Groups:
    """Responses of which each ``size`` in turn are a group.

    The hidden state of a token is the one-hot code of its state, so that the gradient with respect to the head's
    weight is that with respect to the table of logits.

    Args:
        task: The task.
        drawn: Which of the task's responses each response is.
        size: G, the responses of a group.
        device: Where Kedge's functions run.
        dtype: Of hidden states and heads.
    """

    task: Task
    drawn: Int[Tensor, " R"]
    size: int
    device: torch.device
    dtype: torch.dtype

    @cached_property
    def lengths(self) -> Int[Tensor, " R"]:
        """Tokens of each response."""
        return self.task.lengths[self.drawn].to(self.device)

    @cached_property
    def group(self) -> Int[Tensor, " R"]:
        """Group of each response."""
        return torch.arange(len(self.drawn), device=self.device) // self.size

    @cached_property
    def states(self) -> Int[Tensor, " N"]:
        """State before each token."""
        return torch.tensor([s for y in self.drawn.tolist() for s in self.task.states[y]], device=self.device)

    @cached_property
    def tokens(self) -> Int[Tensor, " N"]:
        """All tokens."""
        return torch.tensor(
            [a for y in self.drawn.tolist() for a in self.task.responses[y]], device=self.device
        )

    @cached_property
    def hidden(self) -> Float[Tensor, "N S"]:
        """One-hot codes of the states."""
        return torch.nn.functional.one_hot(self.states, len(self.task.reference)).to(self.dtype)

    @cached_property
    def mask(self) -> Bool[Tensor, " N"]:
        """All tokens were drawn by the policy."""
        return torch.ones_like(self.tokens, dtype=torch.bool)

    def head(self, table: Float[Tensor, "S V"]) -> Head:
        """Return the head whose logits are the table's rows."""
        return Head(table.T.contiguous().to(self.device, self.dtype))

    def likely(self, table: Float[Tensor, "S V"]) -> Float[Tensor, " R"]:
        """Probability of each response's group under a table of logits, divided by G, whatever the group's order."""
        each = self.task.log_likely(table)[self.drawn].reshape(-1, self.size)
        return (each.sum(1).exp() * self._orders / self.size).repeat_interleave(self.size)

    @cached_property
    def _orders(self) -> Float[Tensor, " groups"]:
        """In how many orders each group can be drawn."""
        groups = self.drawn.reshape(-1, self.size).tolist()
        repeats = [math.prod(map(math.factorial, Counter(group).values())) for group in groups]
        return math.factorial(self.size) / torch.tensor(repeats, dtype=torch.float64)

    def weights(self, mode: Mode, likely: Float[Tensor, " R"]) -> Float[Tensor, " N"]:
        """Return the aggregation weights of the tokens in a large batch where responses are as likely as that."""
        even = aggregation_weights(
            self.lengths,
            self.mask,
            mode,
            constant_length=1 if mode == "constant" else None,
            dtype=likely.dtype,
        )
        weights = even * spread(likely * len(likely), self.lengths)
        return weights / weights.sum() if mode == "token_mean" else weights


def all_groups(task: Task, size: int, device: torch.device, dtype: torch.dtype) -> Groups:
    """Lay out every group of ``size`` responses once, in one of its orders."""
    every = itertools.combinations_with_replacement(range(len(task.responses)), size)
    return Groups(task, torch.tensor(list(every)).flatten(), size, device, dtype)


def drawn_groups(
    task: Task,
    table: Float[Tensor, "S V"],
    count: int,
    size: int,
    generator: torch.Generator,
    device: torch.device,
    dtype: torch.dtype,
) -> Groups:
    """Draw ``count`` groups of ``size`` responses from a table of logits."""
    chances = task.log_likely(table).exp()
    drawn = torch.multinomial(chances, count * size, replacement=True, generator=generator)
    return Groups(task, drawn, size, device, dtype)
