"""One head's logits for a chunk of rows, in a buffer that the next chunk uses again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kedge.head.elementwise import Transform
from kedge.head.products import multiply
from kedge.head.request import source_tensors
from kedge.head.room import room_for
from kedge.head.types import Anchor

GATHERED = 2
"""Chunks on a CPU whose gradients go back in one product: each reads and writes the whole gradient of the weight."""


class Projection:
    """The matrix products of a chunk: hidden states to logits, the logits' gradient back to the parameters.

    Where a weight trains on a CPU, the buffer has room for two chunks: gradients stay where the logits were, and
    those of both meet weight and hidden states together.

    Args:
        source: hidden states and head.
        dtype: of the logits, and of the gradients while they are summed.
        chunk_rows: the most rows in a chunk.
        needs: whether the hidden states, the weight, the bias need a gradient.
    """

    def __init__(self, source: Anchor, dtype: torch.dtype, chunk_rows: int, needs: Sequence[bool]) -> None:
        self._hidden, head = source
        self._tokens = head.tokens
        self._weight = head.weight[: self._tokens].to(dtype)
        self.bias = None if head.bias is None else head.bias[: self._tokens].to(dtype)
        gathered = GATHERED if needs[1] and self._hidden.device.type == "cpu" else 1
        rows = min(gathered * chunk_rows, self._hidden.shape[0])
        self._buffer = room_for(self._hidden, (rows, self._tokens), dtype)
        self._gathered = slice(0, 0)  # the rows whose gradients are in the buffer, from its first row on
        self._sums = [
            _room_for_sum(tensor, dtype) if needed else None
            for tensor, needed in zip(source_tensors(source), needs, strict=True)
        ]
        hidden_sum, _, *bias_sum = self._sums
        for small in (hidden_sum, *bias_sum):
            if small is not None:
                small.zero_()
        self._begun = False  # whether the weight's sum holds anything: the first product goes there as it is
        self.logits = self._buffer

    @property
    def trains(self) -> bool:
        """Whether any parameter needs a gradient."""
        return any(total is not None for total in self._sums)

    def load(self, rows: slice) -> None:
        """Put h Wᵀ of these rows, [n, V], into the buffer, behind the gradients that wait there."""
        if rows.start != self._gathered.stop or rows.stop - self._gathered.start > len(self._buffer):
            self._carry_back()
            self._gathered = slice(rows.start, rows.start)
        hidden = self._hidden[rows].to(self._weight.dtype)
        place = rows.start - self._gathered.start
        self.logits = multiply(hidden, self._weight.T, self._buffer[place : place + len(hidden)])

    def accumulate(self, rows: slice) -> None:
        """Take the gradient that has been put in the place of the logits."""
        self._gathered = slice(self._gathered.start, rows.stop)

    def _carry_back(self) -> None:
        """Carry the gradients that wait on to hidden states, weight and bias."""
        rows = self._gathered
        gradient = self._buffer[: rows.stop - rows.start]
        if len(gradient) == 0:
            return
        hidden_sum, weight_sum, *bias_sum = self._sums
        if hidden_sum is not None:
            multiply(gradient, self._weight, hidden_sum[rows])
        if weight_sum is not None:
            states = self._hidden[rows].to(weight_sum.dtype)
            multiply(gradient.T, states, weight_sum[: self._tokens], add=self._begun)
            self._begun = True
        for total in bias_sum:
            if total is not None:
                total[: self._tokens].add_(gradient.sum(0))
        self._gathered = slice(rows.start, rows.start)

    def hidden_gradient(self, rows: slice) -> Tensor:
        """Return what ``accumulate`` has last made of these rows, [n, H]; for hidden states that need a gradient."""
        self._carry_back()
        total = self._sums[0]
        assert total is not None
        return total[rows]

    def gradients(self) -> list[Tensor | None]:
        """Return the summed gradients of hidden states, weight and bias, in the dtype of the sums."""
        self._carry_back()
        weight_sum = self._sums[1]
        if weight_sum is not None:
            weight_sum[self._tokens if self._begun else 0 :].zero_()
        return list(self._sums)


def _room_for_sum(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return room for the gradient of a tensor; that of another dtype, of which a copy leaves the head, is not kept."""
    if tensor.dtype != dtype:
        return tensor.new_empty(tensor.shape, dtype=dtype)
    return room_for(tensor, tensor.shape, dtype, exact=True)


def write_logits(source: Anchor, temperature: float, room: Tensor) -> Tensor:
    """Write the logits of a few rows, as ``Head`` defines them but finite, into the first rows of a buffer [·, V].

    The weight's dtype is the buffer's. A buffer that lives on is a good deal faster than new memory each time.
    """
    hidden, head = source
    product = multiply(hidden.to(room.dtype), head.weight[: head.tokens].T, room[: len(hidden)])
    bias = None if head.bias is None else head.bias[: head.tokens]
    return Transform(head.scale, head.softcap, temperature).apply(product, bias)
