"""The parameters of a language model's head, with what turns their product into logits."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Head:
    """A language model's head.

        logits = softcap · tanh(scale · (h Wᵀ + b) / softcap) / temperature       (no tanh without a soft-cap)

    A bias of −∞ removes its entry from the vocabulary, soft-cap or not. Rows of the weight from
    ``vocabulary`` on are padding: they are cut off before anything is computed, and their gradient is zero.

    Args:
        weight: W, [V, H].
        bias: b, [V].
        scale: the factor on the product (Cohere's logit scale, the inverse of Granite's logits scaling).
        softcap: the bound of the logits (Gemma's final soft-cap).
        vocabulary: how many rows of the weight are tokens; None means all.

    Raises:
        ValueError: if the weight is no matrix, scale or soft-cap is not above 0 and finite, or bias or vocabulary does
            not fit the weight.

    >>> import torch
    >>> Head(torch.zeros(8, 2), vocabulary=5).tokens
    5
    """

    weight: Float[Tensor, "V H"]
    bias: Float[Tensor, " V"] | None = None
    scale: float = 1.0
    softcap: float | None = None
    vocabulary: int | None = None

    def __post_init__(self) -> None:
        if self.weight.ndim != 2:
            raise ValueError(
                f"the head's weight has shape {tuple(self.weight.shape)}; it must be [vocabulary, H] (one that FSDP or "
                "ZeRO has cut up must be gathered first; a DTensor is gathered here)"
            )
        rows = self.weight.shape[0]
        if self.bias is not None and self.bias.shape != (rows,):
            raise ValueError(f"the head's bias has shape {tuple(self.bias.shape)}, its weight {rows} rows")
        for name in ("scale", "softcap"):
            if (value := getattr(self, name)) is not None:
                check_factor(name, value)
                object.__setattr__(
                    self, name, float(value)
                )  # a tensor would be another setting at every call
        if self.vocabulary is not None and not 0 < self.vocabulary <= rows:
            raise ValueError(f"vocabulary is {self.vocabulary}; the head's weight has {rows} rows")

    @property
    def tokens(self) -> int:
        """How many entries the vocabulary has, padding left out."""
        return self.weight.shape[0] if self.vocabulary is None else self.vocabulary

    def detach(self) -> Head:
        """Return the same head, sharing its memory, out of reach of gradients."""
        return replace(
            self, weight=self.weight.detach(), bias=None if self.bias is None else self.bias.detach()
        )

    def snapshot(self) -> Head:
        """Return a frozen copy that later updates of the parameters leave as it is."""
        head = self.detach()
        return replace(
            head, weight=head.weight.clone(), bias=None if head.bias is None else head.bias.clone()
        )


def check_factor(name: str, value: float | Tensor) -> None:
    """Refuse a factor of the logits that is none, or that is to be learnt, which its gradient would not reach.

    Raises:
        ValueError: if it is not above 0 and finite, or requires a gradient.

    >>> check_factor("temperature", 0.7)
    """
    if isinstance(value, Tensor) and value.requires_grad:
        raise ValueError(
            f"{name} requires a gradient, and has none here; give a number, or multiply it into the hidden states"
        )
    if not 0 < value < math.inf:
        raise ValueError(f"{name} is {value}; it must be above 0, and finite")


class Anchor(NamedTuple):
    """A distribution to compare the policy with: hidden states [N, H'] of the same tokens, and their head."""

    hidden: Tensor
    head: Head


PerToken = Callable[[dict[str, Tensor], slice], Tensor]
"""What ``reduce`` calls with the scores of each chunk and its rows, to have that chunk's summed loss."""
