"""Memory for chunks of logits and for summed gradients, which the next call finds again.

A C library returns large memory to the system as soon as it is freed, and the system clears every page of it before
it is touched again: 0.15 seconds a gigabyte, as long as some 60 billion operations of a product. On a CPU the head
therefore keeps what it has allocated, and lends it again when no tensor uses it any more. A GPU's memory is kept by
PyTorch itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from threading import Lock

import torch
from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

LEAST = 2**20
"""Bytes from which memory is kept: of less, the C library takes care."""

UNUSED = 32
"""Loans after which memory that served none of them is freed."""


@dataclass
class _Kept:
    """Memory, and the number of the last loan that it served."""

    storage: UntypedStorage
    loan: int

    def serves(self, size: int) -> bool:
        """Whether it is free, and large enough, but not much larger."""
        held = self.storage.nbytes()
        return size <= held <= 2 * size and torch._C._storage_Use_Count(self.storage._cdata) == 1


_kept: list[_Kept] = []
_loans = 0
_lock = Lock()


def room_for(like: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return a tensor of arbitrary content on the device of another; once it is gone, its memory is lent again.

    >>> first = room_for(torch.ones(1), (512, 1024), torch.float32)
    >>> place = first.data_ptr()
    >>> del first
    >>> room_for(torch.ones(1), (1024, 512), torch.float32).data_ptr() == place
    True
    """
    size = prod(shape) * dtype.itemsize
    plain = type(like) in (Tensor, torch.nn.Parameter) and not is_in_torch_dispatch_mode()
    if size < LEAST or like.device.type != "cpu" or not plain:
        return like.new_empty(shape, dtype=dtype)
    with _lock:
        storage = _lend(size)
        strides = torch.empty(shape, device="meta").stride()
        return torch.empty(0, dtype=dtype, device="cpu").set_(storage, 0, torch.Size(shape), strides)


def forget() -> None:
    """Free all memory that no tensor uses."""
    with _lock:
        _kept.clear()


def _lend(size: int) -> UntypedStorage:
    """Choose the smallest that serves, or make a new one; drop what has not been used for long."""
    global _loans
    _loans += 1
    chosen = min(
        (each for each in _kept if each.serves(size)), key=lambda each: each.storage.nbytes(), default=None
    )
    if chosen is None:
        chosen = _Kept(UntypedStorage(size, device="cpu"), _loans)
        _kept.append(chosen)
    chosen.loan = _loans
    _kept[:] = [each for each in _kept if _loans - each.loan < UNUSED]
    return chosen.storage
