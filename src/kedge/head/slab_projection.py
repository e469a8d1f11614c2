"""The products of a bfloat16 head on a GPU, whose weight is never converted."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kedge.head.projection import Projection
from kedge.head.request import source_tensors
from kedge.head.types import Anchor

SLAB_ROWS = 4096
"""About how many rows of the logits' gradient go into one product: over fewer, it is bound by reading its sum."""


class SlabProjection:
    """Does what ``Projection`` does, with bfloat16 factors and float32 products and sums.

    The logits' gradient is rounded to bfloat16, which costs 0.2 % of an entry and no bias, and gathered over
    several chunks before it meets the hidden states. float16 has too narrow a range for it: gradients of a loss
    that is a mean over many tokens would vanish, so that such heads go through ``Projection``.

    Args:
        source: hidden states and head, both bfloat16.
        chunk_rows: the most rows in a chunk.
        needs: whether the hidden states, the weight, the bias need a gradient.
    """

    def __init__(self, source: Anchor, chunk_rows: int, needs: Sequence[bool]) -> None:
        self._hidden, head = source
        self._tokens = head.tokens
        self._weight = head.weight[: self._tokens]
        self.bias = None if head.bias is None else head.bias[: self._tokens].float()
        count = self._hidden.shape[0]
        rows = max(1, min(chunk_rows, count))
        self._buffer = self._hidden.new_empty((rows, self._tokens), dtype=torch.float32)
        self._sums = [
            tensor.new_zeros(tensor.shape, dtype=torch.float32) if needed else None
            for tensor, needed in zip(source_tensors(source), needs, strict=True)
        ]
        gathered = max(1, SLAB_ROWS // rows) * rows if needs[1] else rows
        self._slab = self._hidden.new_empty((min(gathered, count) if any(needs[:2]) else 0, self._tokens))
        self._rows = slice(0, 0)  # of the hidden states, whose gradients are in the slab
        self.logits = self._buffer

    @property
    def trains(self) -> bool:
        """Whether any parameter needs a gradient."""
        return any(total is not None for total in self._sums)

    def load(self, rows: slice) -> None:
        """Fill the buffer with h Wᵀ of these rows, [n, V]."""
        hidden = self._hidden[rows]
        self.logits = self._buffer[: hidden.shape[0]]
        _product(hidden, self._weight.T, self.logits)

    def accumulate(self, rows: slice) -> None:
        """Carry the gradient that has been put in the buffer on to hidden states, weight and bias."""
        hidden_sum, weight_sum, *bias_sum = self._sums
        if hidden_sum is not None or weight_sum is not None:
            gradient = self._gather(rows)
            if hidden_sum is not None:
                _product(gradient, self._weight, hidden_sum[rows])
        for total in bias_sum:
            if total is not None:
                total[: self._tokens].add_(self.logits.sum(0))

    def hidden_gradient(self, rows: slice) -> Tensor:
        """Return what ``accumulate`` has last made of these rows, [n, H]; for hidden states that need a gradient."""
        total = self._sums[0]
        assert total is not None
        return total[rows]

    def gradients(self) -> list[Tensor | None]:
        """Return the summed gradients of hidden states, weight and bias, in float32."""
        self._flush(0)
        return list(self._sums)

    def _gather(self, rows: slice) -> Tensor:
        """Put the gradient in the buffer behind that of the rows before; empty the slab if that does not fit."""
        if rows.start != self._rows.stop or rows.stop - self._rows.start > self._slab.shape[0]:
            self._flush(rows.start)
        place = self._slab[rows.start - self._rows.start : rows.stop - self._rows.start]
        self._rows = slice(self._rows.start, rows.stop)
        return place.copy_(self.logits)

    def _flush(self, next_row: int) -> None:
        weight_sum, count = self._sums[1], self._rows.stop - self._rows.start
        if weight_sum is not None and count > 0:
            _add_product(weight_sum[: self._tokens], self._slab[:count].T, self._hidden[self._rows])
        self._rows = slice(next_row, next_row)


AnyProjection = Projection | SlabProjection


def make_projection(
    source: Anchor, dtype: torch.dtype, chunk_rows: int, needs: Sequence[bool]
) -> AnyProjection:
    """Return the way of working that suits hidden states and weight."""
    hidden, head = source
    if suits(hidden.device.type, {hidden.dtype, head.weight.dtype}, dtype):
        return SlabProjection(source, chunk_rows, needs)
    return Projection(source, dtype, chunk_rows, needs)


def suits(device: str, factors: set[torch.dtype], logits: torch.dtype) -> bool:
    """Whether factors of these dtypes, on a device of this type, are multiplied as they are."""
    return device == "cuda" and factors == {torch.bfloat16} and logits == torch.float32


def _product(left: Tensor, right: Tensor, out: Tensor) -> None:
    """Put a product of bfloat16 factors into a float32 tensor, without rounding it on the way."""
    if left.device.type == "cuda":
        torch.mm(left, right, out_dtype=torch.float32, out=out)
    else:  # has no product of this kind
        torch.mm(left.float(), right.float(), out=out)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add a product of bfloat16 factors to a float32 tensor."""
    if left.device.type == "cuda":
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(left.float(), right.float())
