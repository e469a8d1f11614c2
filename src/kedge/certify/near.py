"""A policy beside a reference that has drifted a little, over a vocabulary of real size."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Float, Int
from torch import Tensor

ROWS, WIDTH, DRIFT_WIDTH = 32, 56, 8


@dataclass(frozen=True)
class Shape:
    """What the logits of a draw look like.

    Args:
        name: In the table.
        deviation: About their standard deviation.
        lead: Logarithm of the targets' odds against all other tokens, from the first row to the last; None: the
            targets are drawn at random.
        largest: About the largest logit, which float32 rounds the most.
    """

    name: str
    deviation: float
    lead: tuple[float, float] | None
    largest: float


FLAT = Shape("flat", 3.0, None, 16.0)
PEAKED = Shape("peaked", 8.0, (0.0, 8.0), 48.0)


@dataclass(frozen=True)
class Near:
    """The hidden states and heads of a policy and its reference.

    Args:
        hidden: The policy's hidden states.
        weight: Of its head.
        reference: The reference's hidden states.
        reference_weight: Of its head.
        targets: A token for each row.
    """

    hidden: Float[Tensor, "N H"]
    weight: Float[Tensor, "V H"]
    reference: Float[Tensor, "N K"]
    reference_weight: Float[Tensor, "V K"]
    targets: Int[Tensor, " N"]


def draw_near(tokens: int, shape: Shape, drift: float, dtype: torch.dtype) -> Near:
    """Draw hidden states and heads, in numbers that ``dtype`` has, on the CPU.

    Policy and reference share the columns of their heads but for a few by which they differ, so that no rounding
    of the inputs swallows a small drift. The reference's columns are in another order: its sums are rounded in
    other places, as those of another model are.

    Args:
        tokens: Entries of the vocabulary.
        shape: What the logits look like.
        drift: Standard deviation of the difference of the logits.
        dtype: Of everything drawn.

    >>> draw_near(20, FLAT, 0.01, torch.bfloat16).hidden.shape
    torch.Size([32, 64])
    """
    hidden, weight, targets = _draw(tokens, shape)
    generator = torch.Generator().manual_seed(tokens + 1)
    away = drift * DRIFT_WIDTH**-0.5 * torch.randn(ROWS, DRIFT_WIDTH, generator=generator)
    moving = torch.randn(tokens, DRIFT_WIDTH, generator=generator)
    shuffled = torch.randperm(WIDTH, generator=generator)
    return Near(
        hidden=torch.cat([away, hidden], -1).to(dtype),
        weight=torch.cat([moving, weight], -1).to(dtype),
        reference=hidden[:, shuffled].to(dtype),
        reference_weight=weight[:, shuffled].to(dtype),
        targets=targets,
    )


@lru_cache(maxsize=1)
def _draw(tokens: int, shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
    """Draw the hidden states and the head that policy and reference share, and targets."""
    generator = torch.Generator().manual_seed(tokens)
    scale = shape.deviation**0.5 * WIDTH**-0.25
    weight = scale * torch.randn(tokens, WIDTH, generator=generator)
    hidden = scale * torch.randn(ROWS, WIDTH, generator=generator)
    targets = torch.randint(0, tokens, (ROWS,), generator=generator)
    if shape.lead is not None:
        lead, toward = torch.linspace(*shape.lead, ROWS)[:, None], weight[targets]
        for _ in range(4):  # a step toward the target's weight moves the other logits, too, if less
            logits = hidden @ weight.T
            own = logits.gather(-1, targets[:, None])
            others = logits.scatter(-1, targets[:, None], -torch.inf).logsumexp(-1, keepdim=True)
            hidden = hidden + (others + lead - own) / toward.square().sum(-1, keepdim=True) * toward
    return hidden, weight, targets
