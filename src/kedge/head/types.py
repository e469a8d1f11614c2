"""The parameters of a language model's head, with what turns their product into logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Head:
    """A language model's head.

        logits = softcap · tanh(scale · (h Wᵀ + b) / softcap) / temperature        (no tanh without a soft-cap)

    A bias of −∞ removes its entry from the vocabulary, soft-cap or not. Rows of the weight from ``vocabulary`` on are
    padding: they are cut off before anything is computed, and their gradient is zero.

    Args:
        weight: W, [V, H].
        bias: b, [V].
        scale: the factor on the product (Cohere's logit scale, Granite's inverse logits scaling).
        softcap: the bound of the logits (Gemma's final soft-cap).
        vocabulary: how many rows of the weight are tokens; None means all.

    Raises:
        ValueError: if the soft-cap is not above 0, the bias does not fit, or the vocabulary exceeds the weight.

    >>> Head(torch.zeros(8, 2), vocabulary=5).tokens
    5
    """

    weight: Float[Tensor, "V H"]
    bias: Float[Tensor, " V"] | None = None
    scale: float = 1.0
    softcap: float | None = None
    vocabulary: int | None = None

    def __post_init__(self) -> None:
        rows = self.weight.shape[0]
        if self.bias is not None and self.bias.shape != (rows,):
            raise ValueError(
                f"the head's bias has shape {tuple(self.bias.shape)}; its weight has {rows} rows"
            )
        if self.softcap is not None and not self.softcap > 0:
            raise ValueError(f"softcap is {self.softcap}; it must be above 0, or None for no cap")
        if self.vocabulary is not None and not 0 < self.vocabulary <= rows:
            raise ValueError(f"vocabulary is {self.vocabulary}; the head's weight has {rows} rows")

    @property
    def tokens(self) -> int:
        """How many entries the vocabulary has, padding left out."""
        return self.weight.shape[0] if self.vocabulary is None else self.vocabulary

    def detach(self) -> Head:
        """The same head, sharing its memory, out of reach of gradients."""
        return replace(
            self, weight=self.weight.detach(), bias=None if self.bias is None else self.bias.detach()
        )

    def snapshot(self) -> Head:
        """A frozen copy that later updates of the parameters leave as it is."""
        fixed = self.detach()
        return replace(
            fixed, weight=fixed.weight.clone(), bias=None if fixed.bias is None else fixed.bias.clone()
        )


class Anchor(NamedTuple):
    """A distribution that the policy is compared with: hidden states [N, H'] of the same tokens, and their head."""

    hidden: Tensor
    head: Head


PerToken = Callable[[dict[str, Tensor], slice], Tensor]
"""What ``reduce`` calls with each chunk's scores and its rows, to have that chunk's summed loss."""


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """The dtype of logits and scores: float64 if any tensor has it, float32 otherwise."""
    doubles = (tensor is not None and tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if any(doubles) else torch.float32
