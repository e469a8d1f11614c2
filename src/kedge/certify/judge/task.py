"""A task whose optimum is known: all responses of a policy that may stop early, each with its reward."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

END = 0
"""The token that ends a response."""


@dataclass(frozen=True)
class Task:
    """One prompt, a tabular reference ρ, a reward for every response; float64 on the CPU.

    A state is a prefix. A response ends with the token ``END`` or at the longest length.

    Args:
        reference: Logits of ρ in each of the S states; state 0 is the prompt.
        responses: The tokens of each response.
        states: The state before each of them.
        rewards: Reward of each response.
    """

    reference: Float[Tensor, "S V"]
    responses: list[tuple[int, ...]]
    states: list[tuple[int, ...]]
    rewards: Float[Tensor, " R"]

    @cached_property
    def lengths(self) -> Int[Tensor, " R"]:
        """Tokens of each response."""
        return torch.tensor([len(response) for response in self.responses])

    @cached_property
    def packed(self) -> tuple[Int[Tensor, " N"], Int[Tensor, " N"]]:
        """States and tokens of all responses end to end."""
        return (
            torch.tensor([state for each in self.states for state in each]),
            torch.tensor([token for each in self.responses for token in each]),
        )

    def log_likely(self, table: Float[Tensor, "S V"]) -> Float[Tensor, " R"]:
        """Log-probability of each response under a table of logits."""
        states, tokens = self.packed
        which = torch.repeat_interleave(torch.arange(len(self.responses)), self.lengths)
        per_token = table.log_softmax(-1)[states, tokens]
        return per_token.new_zeros(len(self.responses)).index_add(0, which, per_token)

    def visits(self, table: Float[Tensor, "S V"]) -> Float[Tensor, " S"]:
        """Probability that a response passes through each state."""
        reached = torch.repeat_interleave(self.log_likely(table).exp(), self.lengths)
        return reached.new_zeros(len(table)).index_add(0, self.packed[0], reached)


def tree(seed: int, *, vocabulary: int = 3, longest: int = 3, dtype: torch.dtype = torch.float64) -> Task:
    """Draw a task: reference logits and rewards from a standard normal.

    Args:
        seed: Of the draw.
        vocabulary: Tokens, the end among them.
        longest: Tokens of a response at most; with 1 the task is a bandit with one state.
        dtype: What the functions under test will compute in; it represents every entry exactly.

    >>> len(tree(0).responses), len(tree(0, vocabulary=5, longest=1).responses)
    (15, 5)
    """
    prefixes: list[tuple[int, ...]] = [()]
    responses, states = [], []
    for prefix in prefixes:  # grows as it is walked
        for token in range(vocabulary):
            response = (*prefix, token)
            if token == END or len(response) == longest:
                responses.append(response)
                states.append(tuple(prefixes.index(response[:t]) for t in range(len(response))))
            else:
                prefixes.append(response)
    generator = torch.Generator().manual_seed(seed)
    reference = torch.randn(len(prefixes), vocabulary, generator=generator, dtype=torch.float64)
    rewards = torch.randn(len(responses), generator=generator, dtype=torch.float64)
    return Task(reference.to(dtype).double(), responses, states, rewards.to(dtype).double())
