"""One definition, three ways to it: dense, chunked score and chunked reduce agree in values and gradients."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from kedge.head.backend import RUNNERS

ALL = tuple(
    f"{source}.{tensor}" for source in ("policy", "reference") for tensor in ("hidden", "weight", "bias")
)

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "soft-cap": {"softcap": 2.0, "bias": True},
    "scale and temperature": {"scale": 0.6, "temperature": 1.7},
    "everything": {"softcap": 3.0, "scale": 0.6, "temperature": 0.8, "bias": True, "padding": 3},
    "padded vocabulary": {"padding": 5, "bias": True},
    "trained anchor": {"train": ALL, "bias": True, "softcap": 2.5},
    "trained anchor alone": {"train": ALL[3:], "bias": True},
    "two anchors": {"anchors": ("reference", "old"), "train": (*ALL, "old.weight")},
    "no anchor": {"anchors": ()},
    "frozen head": {"train": ("policy.hidden",), "bias": True},
    "frozen hidden states": {"train": ("policy.weight",), "bias": True},
    "bias alone": {"train": ("policy.bias",), "bias": True},
    "masked in both": {"masked": {"policy": [2, 5], "reference": [2, 5]}, "train": ALL},
    "masked in the policy": {"masked": {"policy": [2, 5]}, "train": ALL},
    "masked in the reference": {"masked": {"reference": [2]}, "train": ALL, "softcap": 2.0},
    "masked crosswise": {"masked": {"policy": [1], "reference": [3]}, "train": ALL, "padding": 2},
    "masked and tempered": {
        "masked": {"policy": [1, 2], "reference": [2, 3]},
        "train": ALL,
        "temperature": 3.0,
    },
    "one token": {"rows": 1},
    "one entry": {"tokens": 1, "train": ALL},
    "nothing trained": {"train": ()},
}


def assert_same(
    left: Mapping[str, Tensor | None], right: Mapping[str, Tensor | None], tolerance: float
) -> None:
    assert left.keys() == right.keys()
    for name, value in left.items():
        other = right[name]
        assert (value is None) == (other is None), name
        if value is not None and other is not None:
            finite = value[value.isfinite()].abs()
            largest = finite.max().item() if finite.numel() else 1.0
            torch.testing.assert_close(
                other,
                value,
                rtol=tolerance,
                atol=tolerance * largest,
                msg=lambda text, name=name: f"{name}: {text}",
            )


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("chunk_rows", [None, 4])
def test_chunked_score_is_the_dense_definition(
    variant: str, chunk_rows: int | None, make_case: Callable[..., Any]
) -> None:
    case = make_case(**VARIANTS[variant])
    for found, truth in zip(case.score(chunk_rows=chunk_rows), case.score(backend="dense"), strict=True):
        assert_same(truth, found, 1e-10)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("backend", ["chunked", "dense"])
def test_reduce_is_score(variant: str, backend: str, make_case: Callable[..., Any]) -> None:
    case = make_case(**VARIANTS[variant])
    chunks = {"chunk_rows": 4} if backend == "chunked" else {}
    for found, truth in zip(case.reduce(backend=backend, **chunks), case.score(), strict=True):
        assert_same(truth, found, 1e-10)


@pytest.mark.parametrize("variant", ["plain", "everything", "trained anchor", "masked crosswise"])
def test_agreement_in_float32(variant: str, make_case: Callable[..., Any]) -> None:
    case = make_case(dtype=torch.float32, tokens=301, rows=40, **VARIANTS[variant])
    truth = case.score(backend="dense")
    for found in (case.score(chunk_rows=7), case.reduce(chunk_rows=7)):
        for each, true in zip(found, truth, strict=True):
            assert_same(true, each, 1e-5)


@pytest.mark.parametrize("rows", [1, 2, 3, 8, 9, 10, 1000])
def test_the_size_of_chunks_does_not_matter(rows: int, make_case: Callable[..., Any]) -> None:
    case = make_case(bias=True, softcap=2.0, train=ALL)
    truth = case.score(chunk_rows=9)
    for found in (case.score(chunk_rows=rows), case.reduce(chunk_rows=rows)):
        for each, true in zip(found, truth, strict=True):
            assert_same(true, each, 1e-12)


def test_blocks_within_a_chunk_do_not_matter(
    make_case: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_case(bias=True, softcap=2.0, train=ALL)
    truth = case.score()
    small = dataclasses.replace(RUNNERS["chunked"], block_logits=25)
    monkeypatch.setitem(RUNNERS, "chunked", small)
    for each, true in zip(case.reduce(chunk_rows=5), truth, strict=True):
        assert_same(true, each, 1e-12)


@pytest.mark.parametrize("output", ["log_prob", "entropy", "log_normalizer", "reference.reverse_kl"])
def test_each_output_alone(output: str, make_case: Callable[..., Any]) -> None:
    """A gradient that is dropped when an output is the only one, or not the only one, shows here."""
    case = make_case(train=ALL, bias=True)
    for found, truth in zip(
        case.score([output], chunk_rows=4), case.score([output], backend="dense"), strict=True
    ):
        assert_same(truth, found, 1e-10)


def test_equal_calls_give_equal_bits(make_case: Callable[..., Any]) -> None:
    case = make_case(dtype=torch.float32, rows=50, tokens=300, train=ALL)
    for first, second in zip(case.reduce(chunk_rows=16), case.reduce(chunk_rows=16), strict=True):
        assert_same(first, second, 0.0)
