"""Digits: small drifts, low-precision inputs, sums over many chunks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kedge.head import Head, score


def relative(found: Tensor, truth: Tensor) -> float:
    return ((found.double() - truth).norm() / truth.norm()).item()


def near(dtype: torch.dtype, drift: float) -> dict[str, Any]:
    """A policy and a reference that has drifted a little, in ``dtype``; logit standard deviation about 3."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(64, 32, generator=generator)
    weight = 0.5 * torch.randn(2011, 32, generator=generator)
    reference = hidden + drift * torch.randn(64, 32, generator=generator)
    return {
        "hidden": hidden.to(dtype),
        "weight": weight.to(dtype),
        "reference": reference.to(dtype),
        "targets": torch.randint(0, 2011, (64,), generator=generator),
    }


def kl(given: dict[str, Any], **options: Any) -> dict[str, Tensor]:
    return score(
        given["hidden"],
        Head(given["weight"]),
        given["targets"],
        anchors={"reference": (given["reference"], Head(given["weight"].detach()))},
        want=["log_prob", "entropy", "reference.reverse_kl", "reference.forward_kl"],
        **options,
    )


@pytest.mark.parametrize("drift", [1e-1, 1e-2, 1e-3])
def test_small_kl_against_float64(drift: float) -> None:
    given = near(torch.float32, drift)
    found = kl(given, chunk_rows=20)
    exact = {name: each.double() if each.is_floating_point() else each for name, each in given.items()}
    truth = kl(exact, backend="dense")  # an oracle by another way: it must not share the fault
    for name in ("reference.reverse_kl", "reference.forward_kl"):
        # what is left is the rounding of the products: 1e-6 in logits that differ by the drift
        assert ((found[name] - truth[name]).abs() / truth[name]).max() < 1e-5 + 2e-6 / drift
    for name in ("log_prob", "entropy"):
        assert ((found[name] - truth[name]).abs() / truth[name].abs()).max() < 2e-6


@pytest.mark.parametrize("options", [{"chunk_rows": 20}, {"backend": "dense"}], ids=str)
@pytest.mark.parametrize("drift", [1e-1, 1e-2])
def test_bfloat16_inputs_have_float32_logits(drift: float, options: dict[str, Any]) -> None:
    """Logits rounded to bfloat16 spoil a small KL, and a definition that did so would hide it; inputs are as given."""
    given = near(torch.bfloat16, drift)
    exact = {name: each.double() if each.is_floating_point() else each for name, each in given.items()}
    for tensors in (given, exact):
        tensors["hidden"].requires_grad_()
        tensors["weight"].requires_grad_()
    found, truth = kl(given, **options), kl(exact, backend="dense")
    for name, value in found.items():
        assert value.dtype == torch.float32
        assert relative(value, truth[name]) < 2e-5, name
    found["reference.reverse_kl"].sum().backward()
    truth["reference.reverse_kl"].sum().backward()
    for name in ("hidden", "weight"):
        assert given[name].grad.dtype == torch.bfloat16
        assert relative(given[name].grad, exact[name].grad) < 4e-3, name  # bfloat16's own rounding
    rounded = (given["hidden"] @ given["weight"].T).double()
    anchor = (given["reference"] @ given["weight"].T).double()
    naive = (rounded.softmax(-1) * (rounded.log_softmax(-1) - anchor.log_softmax(-1))).sum(-1)
    assert drift > 1e-2 or relative(naive, truth["reference.reverse_kl"]) > 0.3


def test_weight_gradients_of_many_chunks_are_summed_in_float32() -> None:
    generator = torch.Generator().manual_seed(1)
    hidden = (1 + 0.1 * torch.randn(2000, 2, generator=generator)).bfloat16()
    weight = torch.zeros(3, 2, dtype=torch.bfloat16, requires_grad=True)
    score(hidden, Head(weight), torch.zeros(2000, dtype=torch.int64), want={"log_prob"}, chunk_rows=1)[
        "log_prob"
    ].sum().backward()
    truth = torch.outer(torch.tensor([2 / 3, -1 / 3, -1 / 3], dtype=torch.float64), hidden.double().sum(0))
    assert weight.grad is not None
    assert relative(weight.grad, truth) < 4e-3  # summed in bfloat16 it would stop growing at 256


def test_dtypes_of_outputs(make_case: Callable[..., Any]) -> None:
    for dtype, expected in (
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.float16, torch.float32),
    ):
        case = make_case(dtype=dtype)
        for backend in ("chunked", "dense"):
            scores, gradients = case.score(backend=backend)
            assert {value.dtype for value in scores.values()} == {expected}
            assert {value.dtype for value in gradients.values()} == {dtype}
