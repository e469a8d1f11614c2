"""Large memory on a CPU, which the head lends to its next call instead of freeing it.

A C library returns large memory to the system as soon as it is freed, and the system clears every page of it before
it is touched again: 0.15 seconds a gigabyte, as long as some 60 billion operations of a product. On a CPU the head
therefore keeps what it has allocated, and lends it again once nobody else holds it. A GPU's memory is kept by
PyTorch itself.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from math import prod
from threading import Lock

import torch
from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

LEAST = 2**20
"""Bytes from which memory is kept: of less, the C library takes care."""

UNUSED = 32
"""Loans after which memory that served none of them is freed."""


class _Kept:
    """Memory, and the number of the last loan that it served."""

    def __init__(self, size: int, loan: int) -> None:
        self.storage = UntypedStorage(size, device="cpu")
        self.loan = loan
        self._alone = self._holders()

    def serves(self, size: int, most: int) -> bool:
        """Whether it is of a size between these, and neither a tensor nor anybody's variable nor a process holds it."""
        return size <= self.storage.nbytes() <= most and self._holders() == self._alone

    def gives_way(self, size: int) -> bool:
        """Whether memory of this size would serve whatever it could be lent for, and nobody holds it."""
        return self.serves(-(-size // 2), size - 1)

    def _holders(self) -> tuple[int, int]:
        return torch._C._storage_Use_Count(self.storage._cdata), sys.getrefcount(self.storage)


_kept: list[_Kept] = []
_loans = 0
_lock = Lock()
if hasattr(os, "register_at_fork"):  # a child of a fork must not wait for a thread that it does not have
    os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)


def room_for(like: Tensor, shape: Sequence[int], dtype: torch.dtype, *, exact: bool = False) -> Tensor:
    """Return a tensor of arbitrary content on the device of another; once it is gone, its memory is lent again.

    Args:
        like: a tensor on that device.
        shape: of the tensor.
        dtype: of the tensor.
        exact: whether it leaves the head, so that its memory must not be larger than it is; else up to twice as large.

    >>> room_for(torch.ones(1), (512, 1024), torch.float32).shape
    torch.Size([512, 1024])
    """
    size = prod(shape) * dtype.itemsize
    plain = type(like) in (Tensor, torch.nn.Parameter) and not is_in_torch_dispatch_mode()
    if size < LEAST or like.device.type != "cpu" or not plain:
        return like.new_empty(shape, dtype=dtype)
    strides = torch.empty(shape, device="meta").stride()
    with _lock:
        storage = _lend(size, exact)
        return torch.empty(0, dtype=dtype, device="cpu").set_(storage, 0, torch.Size(shape), strides)


def forget() -> None:
    """Free all memory that nobody else holds."""
    with _lock:
        _kept.clear()


def _lend(size: int, exact: bool) -> UntypedStorage:
    """Choose the smallest that serves, or make a new one; let go what has served nobody for long, or is shared.

    A new one takes the place of one a little smaller: two chunks' gradients need more than one chunk's scores.
    """
    global _loans
    _loans += 1
    _kept[:] = [each for each in _kept if _loans - each.loan < UNUSED and not each.storage.is_shared()]
    most = size if exact else 2 * size
    serving = (each for each in _kept if each.serves(size, most))
    chosen = min(serving, key=lambda each: each.storage.nbytes(), default=None)
    if chosen is None:
        place = None if exact else next((each for each in _kept if each.gives_way(size)), None)
        if place is not None:
            _kept.remove(place)
            del place
        chosen = _new(size)
        _kept.append(chosen)
    chosen.loan = _loans
    return chosen.storage


def _new(size: int) -> _Kept:
    try:
        return _Kept(size, _loans)
    except RuntimeError:  # no memory: what is kept for later is not worth an error
        _kept.clear()
        return _Kept(size, _loans)
