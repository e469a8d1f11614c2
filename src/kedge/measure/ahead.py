"""The head's element-wise work, compiled while the models make their first passes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace

import torch

from kedge.head import Head, score
from kedge.measure.parts import WANT
from kedge.measure.questions import Side

ROWS = 4
"""More than one row, so that any number will do."""


@contextmanager
def compiled_ahead(heads: Mapping[Side, Head], temperature: float, backend: str) -> Iterator[None]:
    """Have the compiler, where it is used, start beside the work inside: it takes seconds, most of them on one core.

    Who needs what it compiles before it is ready waits for it. An error of it is raised there, where it is asked again.
    """
    if backend != "compiled":
        yield
        return
    with ThreadPoolExecutor(1, thread_name_prefix="compiler") as worker:
        worker.submit(_compile, heads, temperature)
        yield


@torch.no_grad()
def _compile(heads: Mapping[Side, Head], temperature: float) -> None:
    """Score zeros: heads of the same vocabularies, of width 1, go through the same element-wise work."""
    narrow = {side: _narrow(head) for side, head in heads.items()}
    hidden = {side: head.weight.new_zeros(ROWS, 1) for side, head in narrow.items()}
    score(
        hidden["policy"],
        narrow["policy"],
        torch.zeros(ROWS, dtype=torch.int64, device=hidden["policy"].device),
        anchors={"reference": (hidden["reference"], narrow["reference"])},
        want=WANT,
        temperature=temperature,
        backend="compiled",
    )


def _narrow(head: Head) -> Head:
    bias = None if head.bias is None else head.bias.new_zeros(head.tokens)
    return replace(head, weight=head.weight.new_zeros(head.tokens, 1), bias=bias, vocabulary=None)
