"""A tabular policy, small enough for every response to be enumerated."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

VOCABULARY = 3
LENGTH = 3


@dataclass(frozen=True)
class Tabular:
    """Three tables of logits over the same states; a state is a prefix, every response has the same length.

    Everything here is float64 on the CPU, whatever is being certified: it is the truth.

    Args:
        policy: Logits of the policy π in each of the S states.
        reference: Logits of the reference ρ.
        behaviour: Logits of another policy μ, which draws the tokens off policy.
        states: State before each token of each of the V^T responses.
        tokens: Each token of each response.
    """

    policy: Float[Tensor, "S V"]
    reference: Float[Tensor, "S V"]
    behaviour: Float[Tensor, "S V"]
    states: Int[Tensor, "R T"]
    tokens: Int[Tensor, "R T"]

    @property
    def length(self) -> int:
        """Tokens of each response."""
        return self.tokens.shape[1]


def draw(
    seed: int, dtype: torch.dtype, *, length: int = LENGTH, drift: float = 0.8, noise: float = 0.5
) -> Tabular:
    """Draw tables at random, with entries that ``dtype`` represents exactly.

    Args:
        seed: Of the draw.
        dtype: What the functions under test will compute in.
        length: Tokens of each response.
        drift: Standard deviation of the policy's logits around the reference's.
        noise: Standard deviation of the behaviour policy's logits around the policy's.

    >>> draw(0, torch.float64).policy.shape
    torch.Size([13, 3])
    """
    generator = torch.Generator().manual_seed(seed)
    prefixes = [p for n in range(length) for p in itertools.product(range(VOCABULARY), repeat=n)]
    number = {prefix: index for index, prefix in enumerate(prefixes)}
    responses = list(itertools.product(range(VOCABULARY), repeat=length))

    def noisy(centre: Tensor, scale: float) -> Tensor:
        normal = torch.randn(centre.shape, generator=generator, dtype=torch.float64)
        return (centre + scale * normal).to(dtype).to(torch.float64)

    reference = noisy(torch.zeros(len(prefixes), VOCABULARY, dtype=torch.float64), 1.0)
    policy = noisy(reference, drift)
    return Tabular(
        policy=policy,
        reference=reference,
        behaviour=noisy(policy, noise),
        states=torch.tensor([[number[response[:t]] for t in range(length)] for response in responses]),
        tokens=torch.tensor(responses),
    )
