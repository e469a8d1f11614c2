"""The choice of a backend: the dense definition, or a way of working in chunks."""

from __future__ import annotations

from typing import NamedTuple

import torch

from kedge.head.runner import COMPILED, EAGER, Runner
from kedge.head.triton_runner import TRITON, installed, refusal

RUNNERS = {"chunked": EAGER, "compiled": COMPILED, "triton": TRITON}
BACKENDS = ("auto", *RUNNERS, "dense")


class Chunks(NamedTuple):
    """How many rows a chunk has, and how its element-wise work is run."""

    rows: int
    runner: Runner


def default_chunk_rows(tokens: int, device: str = "cpu") -> int:
    """How many rows a chunk has: those of 2²⁴ logits, 256 at least (on a GPU 2²⁶, and 384); 4,096 at most.

    It follows from the vocabulary and the type of device alone, so that equal calls give equal bits. Every chunk
    reads the whole weight: over few rows the products wait for memory. On a CPU it is a multiple of 256, which
    oneDNN's products take in whole blocks on every core.

    >>> [default_chunk_rows(tokens) for tokens in (54, 32_000, 151_936)]
    [4096, 512, 256]
    >>> [default_chunk_rows(tokens, "cuda") for tokens in (54, 32_000, 151_936)]
    [4096, 2048, 384]
    """
    logits, least, step = (2**26, 384, 64) if device == "cuda" else (2**24, 256, 256)
    return min(4096, max(least, logits // tokens // step * step))


COMPILING_PAYS = 10**10
"""Logits from which fusing the element-wise work saves minutes on a CPU; compiling takes some ten seconds."""


def fastest_backend(logits: float | int, device: torch.device, pays: float | int = COMPILING_PAYS) -> str:
    """Choose by the work ahead: the same work on the same machine chooses the same again.

    Args:
        logits: about how many will be made.
        device: where the hidden states are.
        pays: from how many on compiling pays.

    >>> fastest_backend(1e6, torch.device("cpu"))
    'chunked'
    """
    if device.type != "cpu":
        return "auto"
    return "compiled" if logits >= pays and compiler_found() else "chunked"


def compiler_found() -> bool:
    """Whether torch's compiler has a C++ compiler to work with."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return False
    return True


def chosen_runner(backend: str, device: torch.device) -> Runner | None:
    """Give the runner of a chunked backend, None for the dense one.

    Raises:
        ValueError: for an unknown backend, or one that cannot run on the device.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; it must be one of: {', '.join(BACKENDS)}")
    if backend == "auto":
        backend = "triton" if device.type == "cuda" and installed() else "chunked"
    reason = refusal(device) if backend == "triton" else None
    if reason is not None:
        raise ValueError(reason)
    return RUNNERS.get(backend)


def chosen_chunks(backend: str, chunk_rows: int | None, tokens: int, device: torch.device) -> Chunks | None:
    """Give rows and runner of a chunked backend, None for the dense one.

    Raises:
        ValueError: as ``chosen_runner`` does; for rows below 1, or rows given to the dense backend.
    """
    runner = chosen_runner(backend, device)
    if runner is None:
        if chunk_rows is not None:
            raise ValueError(f"chunk_rows is {chunk_rows}, but the dense backend has no chunks; leave it out")
        return None
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"chunk_rows is {chunk_rows}; it must be 1 at least")
    return Chunks(default_chunk_rows(tokens, device.type) if chunk_rows is None else chunk_rows, runner)
