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

SLAB_ROWS = 4096
"""About how many rows' gradients of a bfloat16 head go back in one product on a GPU, for the same reason."""

SPREAD = 64
"""A row of logits takes a multiple of so many numbers on a GPU, whose fast products want rows that begin at 16 bytes:
a vocabulary without its padding is often odd."""


class Projection:
    """The matrix products of a chunk: hidden states to logits, the logits' gradient back to the parameters.

    Where a weight trains, the gradients of several chunks wait, and meet weight and hidden states together. On a CPU
    they wait where the logits were, in a buffer with room for two chunks.

    A bfloat16 head on a GPU is never converted: factors are bfloat16, products and sums float32. The gradients wait
    rounded to bfloat16, in memory of their own; that costs 0.2 % of an entry and no bias. float16 has too narrow
    a range for it, gradients of a loss that is a mean over many tokens would vanish: such heads become float32.

    Args:
        source: hidden states and head.
        dtype: of the logits, and of the gradients while they are summed.
        chunk_rows: the most rows in a chunk.
        needs: whether the hidden states, the weight, the bias need a gradient.
    """

    def __init__(self, source: Anchor, dtype: torch.dtype, chunk_rows: int, needs: Sequence[bool]) -> None:
        self._hidden, head = source
        self._tokens = head.tokens
        device, count = self._hidden.device.type, self._hidden.shape[0]
        rows, apart = min(chunk_rows, count), suits(device, {self._hidden.dtype, head.weight.dtype}, dtype)
        self._factor = torch.bfloat16 if apart else dtype
        self._weight = head.weight[: self._tokens].to(self._factor)
        self.bias = None if head.bias is None else head.bias[: self._tokens].to(dtype)
        waiting = min(_chunks_that_wait(device, rows, apart) if needs[1] else rows, count)
        width = row_width(device, self._tokens)
        self._buffer = room_for(self._hidden, (rows if apart else waiting, width), dtype)[:, : self._tokens]
        self._gradients = self._buffer
        if apart:
            slab = self._hidden.new_empty((waiting if any(needs) else 0, width))
            self._gradients = slab[:, : self._tokens]
        self._waiting = slice(0, 0)  # the rows whose gradients wait, from the first row of their memory on
        hidden, weight, *bias = source_tensors(source)
        self._sums = [
            hidden.new_zeros(hidden.shape, dtype=dtype) if needs[0] else None,
            _room_for_sum(weight, dtype) if needs[1] else None,
            *(each.new_zeros(each.shape, dtype=dtype) if needs[2] else None for each in bias),
        ]
        self._begun = False  # whether the weight's sum holds anything: the first product goes there as it is
        self.logits = self._buffer

    @property
    def trains(self) -> bool:
        """Whether any parameter needs a gradient."""
        return any(total is not None for total in self._sums)

    def load(self, rows: slice) -> None:
        """Make the logits h Wᵀ of these rows, [n, V], without touching the gradients that wait."""
        if rows.start != self._waiting.stop or rows.stop - self._waiting.start > len(self._gradients):
            self._carry_back()
            self._waiting = slice(rows.start, rows.start)
        hidden = self._hidden[rows].to(self._factor)
        first = self._place(rows).start if self._gradients is self._buffer else 0
        self.logits = multiply(hidden, self._weight.T, self._buffer[first : first + len(hidden)])

    def apart(self, rows: slice) -> Tensor | None:
        """Return where the gradient of these rows may be put at once, if it waits apart; a bias needs its digits."""
        if self._gradients is self._buffer or self._sums[2:] not in ([], [None]):
            return None
        return self._gradients[self._place(rows)]

    def accumulate(self, rows: slice, *, put_apart: bool = False) -> None:
        """Take the gradient that has been put in the place of the logits, or where ``apart`` said."""
        self._waiting = slice(self._waiting.start, rows.stop)
        if self._gradients is not self._buffer and not put_apart:
            self._gradients[self._place(rows)].copy_(self.logits)
        for total in self._sums[2:]:
            if total is not None:
                total[: self._tokens].add_(self.logits.sum(0))

    def _place(self, rows: slice) -> slice:
        return slice(rows.start - self._waiting.start, rows.stop - self._waiting.start)

    def _carry_back(self) -> None:
        """Carry the gradients that wait on to hidden states and weight."""
        rows, (hidden_sum, weight_sum, *_) = self._waiting, self._sums
        gradient = self._gradients[self._place(rows)]
        if len(gradient) == 0:
            return
        if hidden_sum is not None:
            multiply(gradient, self._weight, hidden_sum[rows])
        if weight_sum is not None:
            states = self._hidden[rows].to(self._factor)
            multiply(gradient.T, states, weight_sum[: self._tokens], add=self._begun)
            self._begun = True
        self._waiting = slice(rows.start, rows.start)

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


def suits(device: str, factors: set[torch.dtype], logits: torch.dtype) -> bool:
    """Whether factors of these dtypes, on a device of this type, are multiplied as they are.

    >>> suits("cuda", {torch.bfloat16}, torch.float32), suits("cpu", {torch.bfloat16}, torch.float32)
    (True, False)
    """
    return device == "cuda" and factors == {torch.bfloat16} and logits == torch.float32


def row_width(device: str, tokens: int) -> int:
    """Return how many numbers a row of logits takes on a device of this type.

    >>> row_width("cuda", 151_665), row_width("cpu", 151_665)
    (151680, 151665)
    """
    return -(-tokens // SPREAD) * SPREAD if device == "cuda" else tokens


def _chunks_that_wait(device: str, rows: int, apart: bool) -> int:
    """Return how many rows' gradients wait for one product with the weight's gradient: some chunks of these rows."""
    if apart:
        return max(1, SLAB_ROWS // max(1, rows)) * rows
    return GATHERED * rows if device == "cpu" else rows


def _room_for_sum(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return room for the gradient of a weight; that of another dtype, of which a copy leaves the head, is not kept.

    Nor are gradients of hidden states: the next call, of other texts, has another number of tokens.
    """
    if tensor.dtype != dtype:
        return tensor.new_empty(tensor.shape, dtype=dtype)
    return room_for(tensor, tensor.shape, dtype, exact=True)


def write_logits(source: Anchor, temperature: float, room: Tensor) -> Tensor:
    """Write the logits of a few rows, as ``Head`` defines them but finite, into the first rows of a buffer [·, V].

    The weight's dtype is the buffer's, or bfloat16 where that is multiplied as it is. A buffer that lives on is a good
    deal faster than new memory each time.
    """
    hidden, head = source
    product = multiply(hidden.to(head.weight.dtype), head.weight[: head.tokens].T, room[: len(hidden)])
    bias = None if head.bias is None else head.bias[: head.tokens]
    return Transform(head.scale, head.softcap, temperature).apply(product, bias)
