"""Kedge's own contenders."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.head.contender import KEDGE, Contender, Step
from benchmarks.head.inputs import Inputs, Size
from benchmarks.head.losses import CACHED, CROSS_ENTROPY, EXACT, SAMPLED, WANT, loss_of
from kedge.head import Head, default_chunk_rows, reduce, score

REDUCE, SCORE = "kedge reduce", "kedge score"


def fast_backend(device: torch.device) -> str:
    """Return what training takes by itself for work of these sizes (``kedge.head.backend.fastest_backend``)."""
    return "triton" if device.type == "cuda" else "compiled"


def kedge_contenders(size: Size, device: torch.device) -> Iterator[Contender]:
    """Give what training takes, at several chunks, and the operations as they stand."""
    fast, default = fast_backend(device), min(default_chunk_rows(size.tokens, device.type), size.rows)
    yield _contender(EXACT, REDUCE, fast, None, default)
    for rows in (256, 512, 1024):
        if rows < size.rows and rows != default:
            yield _contender(EXACT, REDUCE, fast, rows, default)
    yield _contender(EXACT, REDUCE, "chunked", None, default)
    yield _contender(EXACT, SCORE, fast, None, default)
    for task in (SAMPLED, CACHED, CROSS_ENTROPY):
        yield _contender(task, REDUCE, fast, None, default)
    yield _contender(CROSS_ENTROPY, REDUCE, "chunked", None, default)


def _contender(task: str, call: str, backend: str, rows: int | None, default: int) -> Contender:
    options = {"backend": backend, "chunk_rows": rows}

    def build(inputs: Inputs) -> Step:
        return (_reduce if call == REDUCE else _score)(task, inputs, options)

    return Contender(
        task=task,
        family=f"{call} {backend}",
        setting=f"{default} rows (default)" if rows is None else f"{rows} rows",
        build=build,
        side=KEDGE,
        settings={**options, "chunk_rows": rows or default},
        compiles=backend == "compiled",
        default=rows is None,
    )


def _arguments(task: str, inputs: Inputs) -> dict[str, Any]:
    anchored = any("." in name for name in WANT[task])
    reference = (inputs.reference_hidden, Head(inputs.reference_weight))
    return {
        "hidden": inputs.hidden,
        "head": Head(inputs.weight),
        "targets": inputs.targets,
        "want": WANT[task],
        "anchors": {"reference": reference} if anchored else None,
    }


def _reduce(task: str, inputs: Inputs, options: dict[str, Any]) -> Step:
    def per_token(scores: dict[str, Tensor], rows: slice) -> Tensor:
        return loss_of(task, scores, inputs, rows)

    def step() -> Tensor:
        loss, _ = reduce(per_token=per_token, **_arguments(task, inputs), **options)
        loss.backward()
        return loss.detach()

    return step


def _score(task: str, inputs: Inputs, options: dict[str, Any]) -> Step:
    def step() -> Tensor:
        scores = score(**_arguments(task, inputs), **options)
        loss = loss_of(task, scores, inputs, slice(0, inputs.size.rows))
        loss.backward()
        return loss.detach()

    return step
