"""The floor: the matrix products that a task cannot do without, over reused chunk buffers, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from benchmarks.head.contender import FLOOR, Contender, Step
from benchmarks.head.inputs import Inputs, Size
from benchmarks.head.losses import CROSS_ENTROPY, EXACT, PRODUCTS

FAMILY = "bare products"


def floor_contenders(size: Size) -> Iterator[Contender]:
    shared: WeakValueDictionary[str, Tensor] = WeakValueDictionary()
    for task in (EXACT, CROSS_ENTROPY):
        chunks = [rows for rows in (128, 256, 512, 1024, 2048, 4096) if rows < size.rows]
        for rows in [*chunks, min(size.rows, 8192)]:
            yield Contender(
                task,
                FAMILY,
                f"{rows} rows",
                lambda inputs, task=task, rows=rows: _products(inputs, PRODUCTS[task] == 4, rows, shared),
                FLOOR,
                {"chunk_rows": rows, "products": PRODUCTS[task]},
            )


def _products(
    inputs: Inputs, with_reference: bool, chunk_rows: int, shared: MutableMapping[str, Tensor]
) -> Step:
    """Logits of the policy (and of the reference), dh, dW; buffers are made here, outside what is timed.

    Logits are float32. A float32 head has gradients of logits in the same buffer; a bf16 head has them in a buffer
    of its dtype, as products of that dtype need.
    """
    hidden, weight = inputs.hidden.detach(), inputs.weight.detach()
    dtype = hidden.dtype
    shape = (chunk_rows, inputs.size.tokens)
    sources = [(hidden, weight), (inputs.reference_hidden, inputs.reference_weight)][: 1 + with_reference]
    names = ("policy", "reference")[: 1 + with_reference]
    buffers = [_buffer(shared, name, shape, torch.float32, hidden.device) for name in names]
    upstream = (
        buffers[0] if dtype == torch.float32 else _buffer(shared, "upstream", shape, dtype, hidden.device)
    )
    hidden_gradient = torch.empty_like(hidden)
    weight_gradient = _buffer(shared, "dW", tuple(weight.shape), torch.float32, hidden.device)

    def step() -> None:
        for start in range(0, inputs.size.rows, chunk_rows):
            rows = slice(start, min(start + chunk_rows, inputs.size.rows))
            count = rows.stop - rows.start
            for buffer, (states, matrix) in zip(buffers, sources, strict=True):
                _mm(states[rows], matrix.T, buffer[:count])
            torch.mm(upstream[:count], weight, out=hidden_gradient[rows])
            _addmm(weight_gradient, upstream[:count].T, hidden[rows], keep=start > 0)

    return step


def _buffer(
    shared: MutableMapping[str, Tensor],
    name: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """Return what another step of this shape uses, too, or make it: the steps run one at a time."""
    key = f"{name} {shape}"
    found = shared.get(key)
    if found is None:
        found = torch.empty(shape, dtype=dtype, device=device)
        if dtype != torch.float32:  # no product fills it; zeros would be multiplied faster than numbers
            found.normal_()
        shared[key] = found
    return found


def _mm(left: Tensor, right: Tensor, out: Tensor) -> None:
    if left.dtype == out.dtype:
        torch.mm(left, right, out=out)
    else:
        torch.mm(left, right, out_dtype=out.dtype, out=out)


def _addmm(total: Tensor, left: Tensor, right: Tensor, *, keep: bool) -> None:
    if left.dtype == total.dtype:
        total.addmm_(left, right, beta=float(keep))
    else:
        torch.addmm(total, left, right, out_dtype=total.dtype, beta=float(keep), out=total)
