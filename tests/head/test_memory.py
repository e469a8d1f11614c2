"""The memory formula of docs/head.md, held against the peak that torch's profiler measures."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from kedge.head import Head, reduce, score
from kedge.head.room import forget

N, H, V, CHUNK = 512, 16, 8000, 64
BLOCK = 2**17 // V  # rows that the element-wise work takes at a time on a CPU
ALONE, COMPARED = {"log_prob"}, {"log_prob", "entropy", "reference.reverse_kl", "reference.forward_kl"}


def persistent(*, sources: int, train_head: bool, half: bool) -> int:
    """Bytes of what lives through the call: logits, copies of half-precision weights, summed gradients."""
    logits, copies = (sources + train_head) * CHUNK * V, half * sources * V * H
    sums = train_head * V * H + N * H
    return 4 * (logits + copies + sums)


def peak(way: str, want: set[str], dtype: torch.dtype, *, train_head: bool) -> int:
    """Bytes allocated at most by one call, forward and backward."""
    generator = torch.Generator().manual_seed(0)
    hidden, reference = torch.randn(2, N, H, generator=generator).to(dtype)
    weight, fixed = torch.randn(2, V, H, generator=generator).to(dtype)
    given: dict[str, Any] = {
        "hidden": hidden.requires_grad_(),
        "head": Head(weight.requires_grad_(train_head)),
        "targets": torch.zeros(N, dtype=torch.int64),
        "anchors": {"reference": (reference, Head(fixed))},
        "want": want,
        "chunk_rows": CHUNK,
    }

    def total(scores: dict[str, Tensor], rows: slice | None = None) -> Tensor:
        return sum(values.sum() for values in scores.values())

    forget()
    with torch.profiler.profile(profile_memory=True) as profile:
        loss = reduce(**given, per_token=total)[0] if way == "reduce" else total(score(**given))
        loss.backward()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


@pytest.mark.parametrize("way", ["score", "reduce"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("want", "train_head"), [(ALONE, False), (COMPARED, True)], ids=["frozen head", "trained head, anchor"]
)
def test_the_peak_is_what_the_formula_says(
    way: str, dtype: torch.dtype, want: set[str], train_head: bool
) -> None:
    sources = 1 if want == ALONE else 2
    lasting = persistent(sources=sources, train_head=train_head, half=dtype != torch.float32)
    passing = (4 if want == ALONE else 14) * 4 * BLOCK * V
    returned = 2 * (V * H + N * H) * (dtype != torch.float32)
    found = peak(way, want, dtype, train_head=train_head)
    columns = 32 * 1024  # scores and normalisers, a few numbers a row
    assert lasting <= found <= lasting + max(passing, returned) + columns
    assert found < 4 * N * V  # one whole matrix of logits


RESIDENT = """
import resource, sys
import torch
from kedge.head import Head, reduce
torch.set_num_threads(1)
rows, width, tokens = 512, 16, 32000
draw = torch.Generator().manual_seed(0)
def normal(*shape): return torch.randn(*shape, generator=draw)
def step(rows):
    hidden, weight = normal(rows, width).requires_grad_(), normal(tokens, width).requires_grad_()
    loss, _ = reduce(
        hidden, Head(weight), torch.zeros(rows, dtype=torch.int64),
        lambda scores, rows: scores["reference.reverse_kl"].sum(), want={"reference.reverse_kl", "entropy"},
        anchors={"reference": (normal(rows, width), Head(normal(tokens, width)))}, chunk_rows=rows,
    )
    loss.backward()
step(4)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
step(rows)
print((peak() - before) / (4 * rows * tokens))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="about glibc's allocator")
def test_many_blocks_hold_no_more_memory_than_one() -> None:
    """What is kept from a block must not keep the allocator from using the block's memory again."""
    environment = {**os.environ, "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", RESIDENT], env=environment, capture_output=True, text=True, check=True
    )
    assert float(done.stdout) < 2.5  # matrices of logits: two are there, of policy and reference
