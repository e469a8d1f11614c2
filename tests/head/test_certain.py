"""Rows whose next token is almost certain, as most are in a trained model: what is left has its digits, too."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from kedge.head import score_logits

ODDS = [1e3, 1e5, 1e7]
BACKENDS = ["chunked", "triton"]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def certain(odds: float, drift: float = 0.1) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [16, 300] of a policy and of a reference that it has drifted from; the sure tokens."""
    generator = torch.Generator().manual_seed(0)
    policy = torch.randn(16, 300, generator=generator, dtype=torch.float64)
    sure = torch.randint(300, (16,), generator=generator)
    policy.scatter_(1, sure[:, None], -math.inf)
    policy.scatter_(1, sure[:, None], policy.logsumexp(-1, keepdim=True) + math.log(odds))
    reference = policy + drift * torch.randn(16, 300, generator=generator, dtype=torch.float64)
    return policy.float(), reference.float(), sure


def gradients(values: dict[str, Tensor], logits: Tensor) -> dict[str, Tensor]:
    return {
        name: torch.autograd.grad(each.sum(), logits, retain_graph=True)[0] for name, each in values.items()
    }


def defined(policy: Tensor, reference: Tensor, sure: Tensor) -> dict[str, Tensor]:
    log_p, log_q = policy.log_softmax(-1), reference.log_softmax(-1)
    return {
        "log_prob": log_p.gather(-1, sure[:, None])[:, 0],
        "reference.reverse_kl": (log_p.exp() * (log_p - log_q)).sum(-1),
        "reference.forward_kl": (log_q.exp() * (log_q - log_p)).sum(-1),
        "reference.total_variation": 0.5 * (log_p.exp() - log_q.exp()).abs().sum(-1),
    }


def found_by(backend: str, policy: Tensor, reference: Tensor, sure: Tensor) -> dict[str, Tensor]:
    want = ["log_prob", *(f"reference.{each}" for each in ("reverse_kl", "forward_kl", "total_variation"))]
    anchors = {"reference": reference.to(DEVICE)}
    return score_logits(policy.to(DEVICE), sure.to(DEVICE), anchors=anchors, want=want, backend=backend)


@pytest.mark.parametrize("odds", ODDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_values_and_gradients_keep_their_digits(backend: str, odds: float) -> None:
    """Seen to fail with the normalisers' parts subtracted together, and with g·1[a] − g·p at the target."""
    policy, reference, sure = certain(odds)
    policy.requires_grad_()
    exact = policy.detach().double().requires_grad_()
    found = found_by(backend, policy, reference, sure)
    truth = defined(exact, reference.double(), sure)
    for name, value in found.items():
        assert ((value.cpu() - truth[name]).abs() / truth[name].abs()).max() < 1e-4, name
    expected = gradients(truth, exact)
    for name, gradient in gradients(found, policy).items():
        error = (gradient.double() - expected[name]).norm(dim=-1) / expected[name].norm(dim=-1)
        assert error.max() < 1e-4, name


@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_far_below_zero(backend: str) -> None:
    """Only differences of logits count. Seen to fail with columns behind the last tile's end in Σ p·s."""
    policy, reference, sure = certain(10.0)
    shifted = {shift: (policy - shift).requires_grad_() for shift in (0.0, 256.0)}
    slopes = {
        shift: gradients(found_by(backend, logits, reference - shift, sure), logits)
        for shift, logits in shifted.items()
    }
    for name, expected in slopes[0.0].items():
        torch.testing.assert_close(slopes[256.0][name], expected, rtol=1e-3, atol=1e-4)


def test_a_kl_of_numbers_next_to_zero_is_not_negative() -> None:
    for seed in range(300):
        generator = torch.Generator().manual_seed(seed)
        policy = -102 + torch.randn(1, 8, generator=generator)
        policy[0, 0] = 0.0
        reference = policy - 0.26
        reference[0, 0] = 0.0
        found: dict[str, Any] = found_by("chunked", policy, reference, torch.tensor([0]))
        assert found["reference.reverse_kl"] >= 0
        assert found["reference.forward_kl"] >= 0
