"""The choice between the dense definition and the ways of working in chunks."""

from __future__ import annotations

from typing import NamedTuple

from kedge.head.runner import COMPILED, EAGER, Runner

RUNNERS = {"chunked": EAGER, "compiled": COMPILED}
BACKENDS = (*RUNNERS, "dense")


class Chunks(NamedTuple):
    """How many rows a chunk has, and how its element-wise work is run."""

    rows: int
    runner: Runner


def default_chunk_rows(tokens: int) -> int:
    """How many rows a chunk has: those of about 2²⁴ logits, 128 at least, 4,096 at most.

    It follows from the size of the vocabulary alone, so that equal calls give equal bits.

    >>> [default_chunk_rows(tokens) for tokens in (54, 32_000, 151_936)]
    [4096, 512, 128]
    """
    return min(4096, max(128, 2**24 // tokens // 64 * 64))


def chosen_chunks(backend: str, chunk_rows: int | None, tokens: int) -> Chunks | None:
    """Give rows and runner of a chunked backend, None for the dense one.

    Raises:
        ValueError: for an unknown backend, rows below 1, or rows given to the dense backend.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; it must be one of: {', '.join(BACKENDS)}")
    if backend == "dense":
        if chunk_rows is not None:
            raise ValueError(f"chunk_rows is {chunk_rows}, but the dense backend has no chunks; leave it out")
        return None
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"chunk_rows is {chunk_rows}; it must be 1 at least")
    return Chunks(default_chunk_rows(tokens) if chunk_rows is None else chunk_rows, RUNNERS[backend])
