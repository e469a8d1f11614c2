"""One head's logits for a chunk of rows, in a buffer that the next chunk uses again."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kedge.divergence import FAR, Normalizer, normalizer
from kedge.head.request import source_tensors
from kedge.head.types import Anchor

_BLOCK_LOGITS = 2**17  # a few temporaries of this many numbers stay in a core's cache


class Projection:
    """Logits of a chunk, their normalisers, and the way back from the logits' gradient to the parameters.

    Matrix products run over whole chunks, where they are fast. What is element-wise runs over ``blocks()`` of
    a chunk, so that one pass after another finds the same numbers in the cache.

    Args:
        source: hidden states and head.
        temperature: the logits are divided by it.
        dtype: of the logits, and of the gradients while they are summed.
        chunk_rows: the most rows in a chunk.
        needs: whether the hidden states, the weight, the bias need a gradient.
    """

    def __init__(
        self, source: Anchor, temperature: float, dtype: torch.dtype, chunk_rows: int, needs: Sequence[bool]
    ) -> None:
        self._hidden, self._head = source
        self._weight = self._head.weight[: self._head.tokens].to(dtype)
        self._temperature = temperature
        rows = min(chunk_rows, self._hidden.shape[0])
        self._buffer = self._hidden.new_empty((rows, self._head.tokens), dtype=dtype)
        self._parameters = source_tensors(source)
        self._sums = [
            tensor.new_zeros(tensor.shape, dtype=dtype) if needed else None
            for tensor, needed in zip(self._parameters, needs, strict=True)
        ]
        self.logits = self._buffer
        self.normalizer = Normalizer(self._buffer[:, :1], self._buffer[:, :1])

    @property
    def trains(self) -> bool:
        """Whether any parameter needs a gradient."""
        return any(total is not None for total in self._sums)

    def load(self, rows: slice) -> None:
        """Make the logits of these rows, and their normalisers, [n, 1]."""
        hidden = self._hidden[rows].to(self._weight.dtype)
        self.logits = torch.mm(hidden, self._weight.T, out=self._buffer[: hidden.shape[0]])
        parts = [self._finish(self.logits[block]) for block in self.blocks()]
        self.normalizer = Normalizer(*(torch.cat(columns) for columns in zip(*parts, strict=True)))

    def blocks(self) -> list[slice]:
        """Return the rows of the chunk, a few at a time."""
        rows, tokens = self.logits.shape
        step = max(1, _BLOCK_LOGITS // tokens) if self.logits.device.type == "cpu" else rows
        return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]

    def log_prob(self, targets: Tensor) -> Tensor:
        """Return the log-probability [n] of one token in each row of the chunk."""
        log_prob = self.normalizer.log_probs(self.logits.gather(-1, targets[:, None])).squeeze(-1)
        return log_prob.masked_fill(log_prob < -0.5 * FAR, -math.inf)

    def log_normalizer(self) -> Tensor:
        """Return log Σ eˡ, [n], of each row of the chunk."""
        return (self.normalizer.maximum + self.normalizer.log_sum).squeeze(-1)

    def block(self, block: slice) -> tuple[Tensor, Normalizer]:
        """Return the logits and their normalisers of a block."""
        return self.logits[block], Normalizer(*(part[block] for part in self.normalizer))

    def log_probs(self, block: slice) -> Tensor:
        """Return the finite log-probabilities [n, V] of all tokens in each row of a block."""
        logits, normalizer = self.block(block)
        return normalizer.log_probs(logits)

    def put_gradient(self, block: slice, gradient: Tensor) -> None:
        """Overwrite a block's logits with the gradient of h Wᵀ + b, given that of the logits."""
        if self._head.softcap is not None:
            tanh = (self.logits[block] * (self._temperature / self._head.softcap)).clamp_(min=-1.0)
            gradient = gradient * (1.0 - tanh.square_())
        torch.mul(gradient, self._head.scale / self._temperature, out=self.logits[block])

    def accumulate(self, rows: slice) -> None:
        """Carry the gradient that has been put in the buffer on to hidden states, weight and bias."""
        hidden_sum, weight_sum, *bias_sum = self._sums
        if hidden_sum is not None:
            torch.mm(self.logits, self._weight, out=hidden_sum[rows])
        if weight_sum is not None:
            weight_sum[: self._head.tokens].addmm_(self.logits.T, self._hidden[rows].to(weight_sum.dtype))
        for total in bias_sum:
            if total is not None:
                total[: self._head.tokens].add_(self.logits.sum(0))

    def gradients(self) -> list[Tensor | None]:
        """Return the summed gradients of hidden states, weight and bias, in the dtypes of these."""
        return [
            None if total is None else total.to(parameter.dtype)
            for total, parameter in zip(self._sums, self._parameters, strict=True)
        ]

    def _finish(self, logits: Tensor) -> Normalizer:
        """Turn a block of h Wᵀ into finite logits, in place, and return their normaliser."""
        head = self._head
        if head.bias is not None:
            logits += head.bias[: head.tokens]
        if head.softcap is None:
            logits *= head.scale / self._temperature
        else:
            masked = logits == -math.inf
            logits.mul_(head.scale / head.softcap).tanh_().mul_(head.softcap / self._temperature)
            logits.masked_fill_(masked, -math.inf)
        if head.bias is not None:
            logits.clamp_(min=-FAR)
        return normalizer(logits)
