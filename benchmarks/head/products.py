"""The floor: the matrix products that a task cannot do without, over reused chunk buffers, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping
from functools import partial
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from benchmarks.head.contender import FLOOR, Contender, Step
from benchmarks.head.inputs import Inputs, Size
from benchmarks.head.losses import CROSS_ENTROPY, EXACT, PRODUCTS
from kedge.head.products import multiply

BY_TORCH, BY_KEDGE = "bare products", "bare products as Kedge makes them"
"""What torch.mm does, as everybody calls it; what Kedge calls, which leaves less of a CPU idle."""

MOST_ROWS = 8192

Product = Callable[[Tensor, Tensor, Tensor, bool], object]
"""Puts left · right into out, or adds it."""


def floor_contenders(size: Size, device: torch.device) -> Iterator[Contender]:
    shared: WeakValueDictionary[str, Tensor] = WeakValueDictionary()
    families: dict[str, Product] = {BY_TORCH: _by_torch}
    if device.type == "cpu":
        families[BY_KEDGE] = _by_kedge
    for task in (EXACT, CROSS_ENTROPY):
        chunks = [rows for rows in (256, 512, 1024, 2048, 4096) if rows < size.rows]
        for family, product in families.items():
            for rows in [*chunks, min(size.rows, MOST_ROWS)]:
                build = partial(
                    _products,
                    with_reference=PRODUCTS[task] == 4,
                    chunk_rows=rows,
                    shared=shared,
                    product=product,
                )
                settings = {"chunk_rows": rows, "products": PRODUCTS[task]}
                yield Contender(task, family, f"{rows} rows", build, FLOOR, settings)


def _products(
    inputs: Inputs,
    with_reference: bool,
    chunk_rows: int,
    shared: MutableMapping[str, Tensor],
    product: Product,
) -> Step:
    """Logits of the policy (and of the reference), dh, dW; buffers are made here, outside what is timed.

    Logits are float32. A float32 head has gradients of logits in the same buffer; a bf16 head has them in a buffer
    of its dtype, as products of that dtype need.
    """
    hidden, weight = inputs.hidden.detach(), inputs.weight.detach()
    dtype = hidden.dtype
    shape = (
        min(inputs.size.rows, MOST_ROWS),
        inputs.size.tokens,
    )  # one for all chunk sizes: the first rows of it
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
                product(states[rows], matrix.T, buffer[:count], False)
            product(upstream[:count], weight, hidden_gradient[rows], False)
            product(upstream[:count].T, hidden[rows], weight_gradient, start > 0)

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


def _by_torch(left: Tensor, right: Tensor, out: Tensor, add: bool) -> None:
    if left.dtype != out.dtype and add:
        torch.addmm(out, left, right, out_dtype=out.dtype, out=out)
    elif left.dtype != out.dtype:
        torch.mm(left, right, out_dtype=out.dtype, out=out)
    elif add:
        out.addmm_(left, right)
    else:
        torch.mm(left, right, out=out)


def _by_kedge(left: Tensor, right: Tensor, out: Tensor, add: bool) -> None:
    multiply(left, right, out, add=add)
