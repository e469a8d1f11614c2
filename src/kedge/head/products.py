"""Matrix products into memory at hand, by whichever of PyTorch's own libraries is fast on the processor.

PyTorch multiplies float32 matrices on a CPU through MKL, which keeps its AVX-512 kernels for Intel's processors. On
others that have AVX-512 it takes half as long again as it needs, or twice: oneDNN, which every PyTorch build for
x86 carries and uses for other types, has kernels for all of them (docs/head.md has the figures). No public operation
leads to it for float32, so it is called by its symbol; where the symbol is not there, or gives another result than
it should, products are ``torch.mm``. What it refuses, it refuses by ending the process, so that shapes, types and
places are checked before.

Where it is ``torch.mm``, few rows by a whole vocabulary are multiplied a part of the vocabulary at a time: MKL divides
such a product badly, and leaves a quarter of the processor idle.
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

_SYMBOL = "_ZN2at6native13mkldnn_matmulERKNS_6TensorES3_S3_ff"
"""void at::native::mkldnn_matmul(const Tensor&, const Tensor&, const Tensor& out, float beta, float alpha)"""

WORTH = 4_000_000
"""Multiplications from which oneDNN is ahead: it takes some microseconds longer to start."""

LONG = 16_384
"""Terms of a sum from which a small result is made transposed."""

MOST_ROWS = 768
"""Rows of a result up to which MKL divides it badly; with 1,024 it gains nothing to be cut."""

DEEP = 512
"""Terms of its sums from which that is so; with 256 it loses some percent by being cut."""

PART = 512
"""Columns of a result that each thread is given at a time, where MKL would divide the whole of it."""

Product = Callable[[Tensor, Tensor, Tensor, bool], None]


def multiply(left: Tensor, right: Tensor, out: Tensor, *, add: bool = False) -> Tensor:
    """Put left · right into ``out``, or add it to what is there; no gradient is recorded.

    ``torch.backends.mkldnn.enabled = False`` leaves it to ``torch.mm``, as does a dispatch mode, which wants to see
    operations (torch's FLOP counter is one). Equal calls give equal bits: what is taken follows from processor, number
    of threads, shapes and dtype alone.

    Factors in bfloat16 and a float32 ``out`` are multiplied as they are on a GPU, and never rounded on the way.

    Args:
        left: [M, K], any strides.
        right: [K, N], any strides, of the same dtype.
        out: [M, N], of that dtype, or float32 for factors in bfloat16; contiguous, for the faster product.
        add: whether to add.

    Returns:
        ``out``.

    Raises:
        RuntimeError: PyTorch's, for shapes or types that do not fit.

    >>> a, b = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0], [4.0]])
    >>> out = torch.empty(1, 1)
    >>> multiply(a, b, out).item(), multiply(a, b, out, add=True).item()
    (11.0, 22.0)
    """
    if (left.dtype, out.dtype) == (torch.bfloat16, torch.float32):
        _widened(left, right, out, add)
    elif _worth(left, right, out) and reachable(left, right, out) and (fast := onednn()) is not None:
        if add or not _better_turned(left, out):
            fast(left, right, out, add)
        else:
            turned = out.new_empty(out.shape[::-1])
            fast(right.T, left.T, turned, False)
            out.copy_(turned.T)
    elif add:
        out.addmm_(left, right)
    elif _better_cut(left, right, out):
        width = PART * torch.get_num_threads()
        for part, columns in zip(out.split(width, dim=1), right.split(width, dim=1), strict=True):
            torch.mm(left, columns, out=part)
    else:
        torch.mm(left, right, out=out)
    return out


def _better_cut(left: Tensor, right: Tensor, out: Tensor) -> bool:
    """Whether MKL makes a result faster some columns at a time: one of few rows and very many columns."""
    rows, columns = out.shape if out.ndim == 2 else (0, 0)
    many = columns >= max(LONG, 4 * PART * torch.get_num_threads())
    return (
        many
        and rows <= MOST_ROWS
        and left.shape[-1] >= DEEP
        and right.shape[1:] == (columns,)
        and _plain(out)
    )


def _widened(left: Tensor, right: Tensor, out: Tensor, add: bool) -> None:
    if left.device.type != "cuda":  # has no product of this kind
        multiply(left.to(out.dtype), right.to(out.dtype), out, add=add)
    elif add:
        torch.addmm(out, left, right, out_dtype=out.dtype, out=out)
    else:
        torch.mm(left, right, out_dtype=out.dtype, out=out)


def reachable(*tensors: Tensor) -> bool:
    """Whether oneDNN may be called for these now: float32 numbers that lie in this process's memory as they read.

    The symbol takes a tensor for what its pointer shows: a subclass, a wrapper of ``torch.func``, a view that
    negates, or whatever a dispatch mode makes of it, is left to PyTorch.

    >>> reachable(torch.ones(2)), reachable(torch.ones(2, dtype=torch.float64))
    (True, False)
    """
    return (
        bool(torch.backends.mkldnn.enabled) and not is_in_torch_dispatch_mode() and all(map(_plain, tensors))
    )


def _plain(tensor: Tensor) -> bool:
    return (
        tensor.dtype == torch.float32
        and tensor.device.type == "cpu"
        and tensor.layout == torch.strided
        and type(tensor) in (Tensor, torch.nn.Parameter)
        and not tensor.is_neg()
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    )


def _worth(left: Tensor, right: Tensor, out: Tensor) -> bool:
    """Whether the product is large; one whose shapes do not fit is left to PyTorch, which says so."""
    if not left.ndim == right.ndim == out.ndim == 2 or left.shape[1] != right.shape[0]:
        return False
    rows, columns = left.shape[0], right.shape[1]
    return rows * right.numel() >= WORTH and out.shape == (rows, columns) and out.is_contiguous()


def _better_turned(left: Tensor, out: Tensor) -> bool:
    """Whether oneDNN makes the transposed result faster, by 3 to 25 %: a small one, of very long sums."""
    rows, columns = out.shape
    return left.shape[1] >= LONG and rows >= 384 and columns >= 256 and columns % 16 == 0


@cache
def onednn() -> Product | None:
    """Return oneDNN's product, where it is the faster one: on x86 with AVX-512, if the processor is not Intel's."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.backends.mkldnn.is_available():
        return None
    found = _by_symbol() if vendor() not in ("GenuineIntel", None) else None
    return found if found is not None and _is_right(found) else None


def vendor() -> str | None:
    """Return the name that an x86 processor gives its maker, where the system tells."""
    listed = Path("/proc/cpuinfo")
    if platform.machine() != "x86_64" or not listed.exists():
        return None
    lines = (
        line.partition(":") for line in listed.read_text(encoding="utf-8", errors="replace").splitlines()
    )
    return next((value.strip() for name, _, value in lines if name.strip() == "vendor_id"), None)


def _by_symbol() -> Product | None:
    """Bind the symbol. A tensor in C++ is one pointer, which Python's tensor knows as ``_cdata``."""
    try:
        function = getattr(ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")), _SYMBOL)
    except (OSError, AttributeError):
        return None
    function.restype = None
    function.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_float] * 2
    three, step = ctypes.c_void_p * 3, ctypes.sizeof(ctypes.c_void_p)

    def product(left: Tensor, right: Tensor, out: Tensor, add: bool) -> None:
        tensors = three(left._cdata, right._cdata, out._cdata)
        first = ctypes.addressof(tensors)
        function(first, first + step, first + 2 * step, float(add), 1.0)

    return product


def _is_right(product: Product) -> bool:
    """Try it on small matrices, one of them transposed, whatever the default type and device are."""
    count = partial(torch.arange, dtype=torch.float32, device="cpu")
    left, right, out = count(12).reshape(4, 3).T, count(8).reshape(4, 2), count(6).reshape(3, 2)
    truth = out + left @ right
    product(left, right, out, True)
    return torch.equal(out, truth)
