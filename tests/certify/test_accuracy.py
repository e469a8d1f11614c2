"""The head's accuracy table: it holds, and a head with rounded logits would not."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from rich.console import Console

from kedge import certify
from kedge.certify import Accuracy, accuracy, head_accuracy, print_accuracy
from kedge.certify.near import FLAT, PEAKED, draw_near
from kedge.certify.whole import whole_results
from kedge.cli import main
from kedge.head import chunked, elementwise


@pytest.fixture(scope="module")
def found() -> list[Accuracy]:
    return list(head_accuracy(vocabularies=[3001]))


def test_every_bound_holds_and_rounded_logits_break_every_one(found: list[Accuracy]) -> None:
    assert [each for each in found if not each.passed] == []
    assert [each for each in found if each.holds(each.rounded)] == []
    assert len(found) == 2 * 2 * 3 * 4


def test_rounded_logits_spoil_a_small_kl(found: list[Accuracy]) -> None:
    small = [each for each in found if each.drift == 0.001 and each.output.endswith("kl")]
    assert len(small) == 8
    for each in small:
        assert each.rounded.value > 50 * each.found.value
        assert each.rounded.hidden > 0.5


def test_the_draws_are_what_they_are_called() -> None:
    for shape, drift in ((FLAT, 0.1), (PEAKED, 0.001)):
        near = draw_near(20_011, shape, drift, torch.bfloat16)
        logits = near.hidden.double() @ near.weight.double().T
        reference = near.reference.double() @ near.reference_weight.double().T
        assert logits.std().item() == pytest.approx(shape.deviation, rel=0.25)
        assert (logits - reference).std().item() == pytest.approx(drift, rel=0.1)
        assert logits.max().item() == pytest.approx(shape.largest, rel=0.35)
        top = logits.softmax(-1).amax(-1)
        assert (top.median().item() > 0.9) == (shape is PEAKED)
        assert top.max().item() < 0.9999


def test_the_truth_is_the_textbook() -> None:
    near = draw_near(50, FLAT, 0.1, torch.float32)
    true = whole_results(near, torch.float64)
    hidden, weight = near.hidden.double().requires_grad_(), near.weight.double().requires_grad_()
    p = (hidden @ weight.T).softmax(-1)
    q = (near.reference.double() @ near.reference_weight.double().T).softmax(-1)
    by_hand = {
        "log_prob": p.gather(-1, near.targets[:, None]).log().squeeze(-1),
        "entropy": -(p * p.log()).sum(-1),
        "reference.reverse_kl": (p * (p / q).log()).sum(-1),
        "reference.forward_kl": (q * (q / p).log()).sum(-1),
    }
    assert by_hand.keys() == true.keys()
    for output, value in by_hand.items():
        gradients = torch.autograd.grad(value.sum(), (hidden, weight), retain_graph=True)
        for one, other in zip(true[output], (value.detach(), *gradients), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def _half(function: Callable[..., Any]) -> Callable[..., Any]:
    def broken(self: Any, product: torch.Tensor, bias: Any) -> torch.Tensor:
        return function(self, product.copy_(product.bfloat16()), bias)

    return broken


def test_a_head_that_rounds_its_logits_goes_red(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elementwise.Transform, "apply", _half(elementwise.Transform.apply))
    assert not any(each.passed for each in head_accuracy(vocabularies=[500], drifts=[0.01]))


def test_a_gradient_that_is_not_finite_goes_red(monkeypatch: pytest.MonkeyPatch) -> None:
    right = chunked.Workspace.gradients

    def broken(self: Any) -> list[torch.Tensor | None]:
        return [None if each is None else each * torch.nan for each in right(self)]

    monkeypatch.setattr(chunked.Workspace, "gradients", broken)
    (*_, last) = head_accuracy(vocabularies=[100], drifts=[0.1])
    assert not last.passed
    assert last.found.weight == float("inf")


def test_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(
        certify, "head_accuracy", partial(head_accuracy, vocabularies=[300], drifts=[0.1])
    )  # the rest is as the command gives it
    assert main(["certify", "--head", "--dtype", "bfloat16", "--backend", "chunked", "dense"]) == 0
    shown = capsys.readouterr().out
    assert "16 of 16 hold" in shown
    monkeypatch.setattr(accuracy, "_limit", lambda *_: 0.0)
    assert main(["certify", "--head", "--dtype", "float32"]) == 1
    assert main(["certify", "--head", "--dtype", "float64"]) == 2
    assert main(["certify", "--head", "--backend", "abacus"]) == 2
    assert main(["certify", "--backend", "dense"]) == 2
    refused = capsys.readouterr().err
    assert "give --dtype float32 or bfloat16" in refused
    assert "backend is 'abacus'" in refused
    assert "give --head, or leave it out" in refused


def test_the_table_shows_every_figure(found: list[Accuracy]) -> None:
    text = io.StringIO()
    print_accuracy(found, Console(file=text, width=80))
    shown = text.getvalue()
    assert "default backend, vocabulary 3,001, peaked, bfloat16 inputs" in shown
    assert shown.count("reverse_kl") == 12
    assert "…" not in shown
    assert f"{len(found)} of {len(found)} hold" in shown
