"""A head whose parameters are spread over processes, gathered for one call."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from kedge.head.types import Head


def gathered(head: Head) -> Head:
    """Return a head with whole parameters in every process; one that is not sharded is returned as it is.

    A parameter that is a ``DTensor`` (``fully_shard``, tensor parallelism) is gathered once. Its gradient is
    summed over a whole [V, H] in each process, then reduced once to the mean over the processes, each keeping its
    shard. The mean is what data parallelism gives every other parameter, and is right too where all processes
    see the same tokens.
    """
    if not any(_is_sharded(each) for each in (head.weight, head.bias)):
        return head
    return replace(head, weight=_whole(head.weight), bias=None if head.bias is None else _whole(head.bias))


def refuse_sharded(name: str, hidden: Tensor) -> None:
    """Raise ValueError for hidden states that are a DTensor: a process scores the tokens that it has."""
    if _is_sharded(hidden):
        raise ValueError(
            f"the hidden states of {name!r} are a DTensor; give each process its own tokens, as plain tensors "
            "(to_local() of rows that are sharded, full_tensor() of anything else)"
        )


def _is_sharded(tensor: Tensor | None) -> bool:
    return hasattr(tensor, "full_tensor")


def _whole(tensor: Any) -> Tensor:
    if not _is_sharded(tensor):
        whole: Tensor = tensor
        return whole
    from torch.distributed.tensor import Partial

    mesh = tensor.device_mesh
    whole = tensor.full_tensor(grad_placements=[Partial()] * mesh.ndim)
    if whole.requires_grad:
        whole.register_hook(lambda gradient: gradient / mesh.size())  # gloo sums, it knows no mean
    return whole
