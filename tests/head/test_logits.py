"""Scores of logits against ``kedge.divergence`` and autograd."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from kedge.divergence import entropy, forward_kl, reverse_kl, total_variation
from kedge.head import score_logits, triton_runner
from kedge.head.backend import RUNNERS

N, V = 4, 21
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ["chunked", "triton"]
WANT = ["log_prob", "entropy", "log_normalizer"] + [
    f"{name}.{output}"
    for name in ("reference", "old")
    for output in ("log_prob", "reverse_kl", "forward_kl", "total_variation")
]


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tiles a row, two blocks."""
    monkeypatch.setattr(triton_runner, "MOST_IN_A_TILE", 16)
    small = dataclasses.replace(RUNNERS["chunked"], block_logits=2 * V)
    monkeypatch.setattr("kedge.head.logits.EAGER", small)
    monkeypatch.setitem(RUNNERS, "chunked", small)


def inputs(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(3, N, V, generator=generator)
    logits[:, :, 5] = -math.inf
    return dict(zip(("policy", "reference", "old"), logits.to(device=DEVICE, dtype=dtype), strict=True))


def found_by(given: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    return score_logits(given["policy"], **(targets_and_anchors(given) | options))


def targets_and_anchors(given: dict[str, Tensor]) -> dict[str, Any]:
    return {
        "targets": torch.tensor([0, 20, 5, 7], device=DEVICE),
        "anchors": {name: logits for name, logits in given.items() if name != "policy"},
        "want": WANT,
    }


def by_definition(given: dict[str, Tensor]) -> dict[str, Tensor]:
    targets = targets_and_anchors(given)["targets"]
    found = {"entropy": entropy(given["policy"]), "log_normalizer": given["policy"].logsumexp(-1)}
    for name, logits in given.items():
        log_prob = logits.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)
        prefix = "" if name == "policy" else f"{name}."
        found[f"{prefix}log_prob"] = torch.where(log_prob.isinf(), -math.inf, log_prob)
        if prefix:
            for kind, function in (
                ("reverse_kl", reverse_kl),
                ("forward_kl", forward_kl),
                ("total_variation", total_variation),
            ):
                found[f"{prefix}{kind}"] = function(given["policy"], logits)
    return {name: found[name] for name in WANT}


def pulled(scores: dict[str, Tensor], leaves: list[Tensor]) -> tuple[Tensor | None, ...]:
    moving = [values for values in scores.values() if values.requires_grad]
    upstream = [torch.linspace(0.5, 1.5 + i, N).to(values) for i, values in enumerate(moving)]
    return torch.autograd.grad(moving, leaves, upstream, allow_unused=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("trains", "dtype"),
    [
        (("policy",), torch.float32),
        (("policy", "reference", "old"), torch.float32),
        (("old",), torch.float32),
        (("policy", "old"), torch.float64),
        (("policy",), torch.bfloat16),
    ],
)
def test_values_and_gradients(backend: str, trains: tuple[str, ...], dtype: torch.dtype) -> None:
    given = inputs(dtype)
    exact = {name: each.double() for name, each in given.items()}
    before = {name: each.clone() for name, each in given.items()}
    for tensors in (given, exact):
        for name in trains:
            tensors[name].requires_grad_()
    scores, truth = found_by(given, backend=backend), by_definition(exact)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    for name, value in truth.items():
        assert scores[name].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert scores[name].requires_grad == value.requires_grad, name
        torch.testing.assert_close(scores[name].double(), value, rtol=tolerance, atol=tolerance, msg=name)
    gradients = pulled(scores, [given[name] for name in trains])
    expected = pulled(truth, [exact[name] for name in trains])
    for found, true in zip(gradients, expected, strict=True):
        assert found is not None
        assert true is not None
        assert found.dtype == dtype
        tolerance = 1e-2 if dtype == torch.bfloat16 else tolerance
        torch.testing.assert_close(found.double(), true, rtol=tolerance, atol=tolerance)
    for name, each in before.items():
        assert torch.equal(given[name].detach(), each)  # neither forward nor backward writes to them


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_what_is_pulled_at_moves(backend: str) -> None:
    given = inputs()
    for each in given.values():
        each.requires_grad_()
    scores = found_by(given, backend=backend)
    scores["reference.log_prob"].nan_to_num(neginf=0.0).sum().backward()
    assert given["policy"].grad is given["old"].grad is None
    assert given["reference"].grad.isfinite().all()
    assert given["reference"].grad.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_odd_strides_and_no_rows(backend: str) -> None:
    given = inputs()
    wide = {name: each.T.contiguous().T for name, each in given.items()}
    assert wide["policy"].stride(1) != 1
    for name, value in found_by(given).items():
        torch.testing.assert_close(found_by(wide, backend=backend)[name], value)
    part = torch.zeros(N, V + 3, device=DEVICE)
    part[:, :V] = given["policy"]
    narrow = given | {"policy": part[:, :V]}
    for name, value in found_by(given).items():
        torch.testing.assert_close(found_by(narrow, backend=backend)[name], value)
    none = torch.zeros(0, V, device=DEVICE, requires_grad=True)
    targets = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    scores = score_logits(none, targets, want=["log_prob"], backend=backend)
    assert scores["log_prob"].shape == (0,)
    scores["log_prob"].sum().backward()
    assert none.grad.shape == (0, V)


@pytest.mark.usefixtures("unchecked")
def test_refusals_say_what_is_wrong() -> None:
    given = inputs()
    targets = targets_and_anchors(given)["targets"]

    def refuse(match: str, logits: Tensor = given["policy"], **changes: Any) -> None:
        with pytest.raises(ValueError, match=match):
            score_logits(logits, **({"targets": targets, "want": ["log_prob"]} | changes))

    refuse("'log_probs' is wanted", want=["log_probs"])
    refuse(r"'old' has logits of shape \(4, 20\), the policy \(4, 21\)", anchors={"old": torch.zeros(4, 20)})
    refuse(r"'policy' has logits of shape \(1, 4, 21\)", given["policy"][None])
    refuse("an anchor is named 'policy'", anchors={"policy": given["policy"]})
    refuse("for logits it must be one of: auto, chunked, compiled, triton", backend="dense")
    refuse(r"targets have shape \(2,\)", targets=targets[:2])
