"""Exact divergences from logits: closed forms, laws, digits in float32, gradients, masks, refusals."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kedge.divergence import (
    cross_entropy,
    entropy,
    forward_kl,
    jensen_shannon,
    reverse_kl,
    total_variation,
)

INF = math.inf
PAIRS = [cross_entropy, reverse_kl, forward_kl, jensen_shannon, total_variation]


def logits(*probabilities: float) -> Tensor:
    """Logits of a distribution, shifted, since a shift must not matter."""
    return torch.tensor(probabilities, dtype=torch.float64).log() + 7.0


# --- closed forms --------------------------------------------------------------------------------------

A, B = (0.5, 0.5), (0.25, 0.75)
CLOSED_FORMS = [
    (reverse_kl, 0.5 * math.log(2) + 0.5 * math.log(2 / 3)),
    (forward_kl, 0.25 * math.log(0.5) + 0.75 * math.log(1.5)),
    (cross_entropy, -0.5 * math.log(0.25) - 0.5 * math.log(0.75)),
    (jensen_shannon, (math.log(4 / 3) + math.log(4 / 5) + 0.5 * math.log(2 / 3) + 1.5 * math.log(6 / 5)) / 4),
    (total_variation, 0.25),
]


@pytest.mark.parametrize(("function", "truth"), CLOSED_FORMS)
def test_closed_forms(function: Callable[..., Tensor], truth: float) -> None:
    assert function(logits(*A), logits(*B)).item() == pytest.approx(truth, rel=1e-14)


def test_entropy_closed_forms() -> None:
    assert entropy(torch.zeros(3, 8), unit="bits").tolist() == pytest.approx([3.0] * 3)
    assert entropy(logits(*B)).item() == pytest.approx(
        -0.25 * math.log(0.25) - 0.75 * math.log(0.75), rel=1e-14
    )
    assert entropy(torch.tensor([500.0, -500.0])).item() == 0.0


@pytest.mark.parametrize("function", PAIRS)
def test_temperature_divides_both_logits(function: Callable[..., Tensor]) -> None:
    p, q = torch.randn(2, 5, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(function(p, q, temperature=0.5), function(2 * p, 2 * q))
    torch.testing.assert_close(entropy(p, temperature=0.5), entropy(2 * p))


# --- laws ----------------------------------------------------------------------------------------------

values = st.floats(-30, 30, allow_nan=False)
tables = st.integers(2, 6).flatmap(
    lambda size: st.tuples(*[st.lists(values, min_size=size, max_size=size)] * 2)
)


@settings(max_examples=200, deadline=None)
@given(tables)
def test_laws(table: tuple[list[float], list[float]]) -> None:
    p, q = (torch.tensor(row, dtype=torch.float64) for row in table)
    kl, variation, js = reverse_kl(p, q).item(), total_variation(p, q).item(), jensen_shannon(p, q).item()
    assert kl >= 0
    assert forward_kl(q, p).item() == kl
    assert cross_entropy(p, q).item() == pytest.approx(entropy(p).item() + kl, rel=1e-12, abs=1e-12)
    assert js == pytest.approx(jensen_shannon(q, p).item(), rel=1e-12, abs=1e-15)
    assert 0 <= js <= math.log(2)
    assert 0 <= variation <= 1
    assert variation == pytest.approx(total_variation(q, p).item(), rel=1e-12)
    assert 2 * variation**2 <= kl + 1e-14  # Pinsker
    assert js <= math.log(2) * variation + 1e-14  # Lin
    for function in (cross_entropy, reverse_kl, forward_kl, jensen_shannon):
        assert function(p, q, unit="bits").item() == pytest.approx(function(p, q).item() / math.log(2))


@settings(max_examples=100, deadline=None)
@given(st.lists(values, min_size=1, max_size=6), st.floats(-1e3, 1e3), st.floats(1e-3, 30))
def test_zero_if_and_only_if_equal(row: list[float], shift: float, change: float) -> None:
    p = torch.tensor(row, dtype=torch.float64)
    for function in (reverse_kl, forward_kl, jensen_shannon, total_variation):
        assert function(p, p).item() == 0
        assert function(p, p + shift).item() == pytest.approx(0, abs=1e-12)
    changed = torch.cat([p, p[:1]]), torch.cat([p, p[:1] + change])
    for function in (reverse_kl, forward_kl, jensen_shannon, total_variation):
        assert function(*changed).item() > 0


def test_against_an_independent_sum() -> None:
    p, q = 3 * torch.randn(2, 4, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for row in range(4):
        weights = [[math.exp(value) for value in one[row].tolist()] for one in (p, q)]
        left, right = ([each / math.fsum(weight) for each in weight] for weight in weights)
        both = list(zip(left, right, strict=True))
        truth = math.fsum(a * math.log(a / b) for a, b in both)
        assert reverse_kl(p, q)[row].item() == pytest.approx(truth, rel=1e-12)
        truth = 0.5 * math.fsum(
            a * math.log(2 * a / (a + b)) + b * math.log(2 * b / (a + b)) for a, b in both
        )
        assert jensen_shannon(p, q)[row].item() == pytest.approx(truth, rel=1e-12)


# --- digits in float32 ---------------------------------------------------------------------------------


@pytest.mark.parametrize("spread", [1.0, 3.0, 10.0])
@pytest.mark.parametrize(("drift", "tolerance"), [(1e-1, 2e-6), (1e-2, 2e-6), (1e-3, 2e-6), (1e-4, 2e-5)])
def test_small_divergences_keep_their_digits_in_float32(
    spread: float, drift: float, tolerance: float
) -> None:
    generator = torch.Generator().manual_seed(2)
    p = spread * torch.randn(32, 4099, generator=generator)
    q = p + drift * torch.randn(32, 4099, generator=generator)
    for function in (reverse_kl, forward_kl, jensen_shannon):
        truth = function(p.double(), q.double())
        assert ((function(p, q) - truth).abs() / truth).max() < tolerance
    assert (total_variation(p, q) - total_variation(p.double(), q.double())).abs().max() < 5e-7
    assert ((entropy(p) - entropy(p.double())) / entropy(p.double())).abs().max() < 2e-6
    naive = (p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum(-1)
    truth = reverse_kl(p.double(), q.double())
    assert drift > 1e-3 or ((naive - truth).abs() / truth).max() > 1e-2  # what the textbook sum makes of it


def test_rows_far_from_zero_keep_their_digits() -> None:
    """Normalisers must be compared part by part: one unit in the last place of 1,024 is 1e-4."""
    generator = torch.Generator().manual_seed(3)
    p = torch.randint(-40, 40, (64, 1000), generator=generator) / 4
    q = p + 2.0**-10 * torch.randint(-1, 2, p.shape, generator=generator)
    p, q = p + 1024, q + 1024
    truth = reverse_kl(p.double(), q.double())
    assert ((reverse_kl(p, q) - truth).abs() / truth).max() < 2e-6


def test_inputs_of_lower_precision_are_computed_in_float32() -> None:
    p, q = torch.randn(2, 3, 10, generator=torch.Generator().manual_seed(4)).bfloat16()
    for function in PAIRS:
        assert function(p, q).dtype == torch.float32
        torch.testing.assert_close(function(p, q), function(p.float(), q.float()), rtol=0, atol=0)


# --- gradients -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", PAIRS)
def test_gradcheck(function: Callable[..., Tensor]) -> None:
    generator = torch.Generator().manual_seed(5)
    p = (2 * torch.randn(3, 5, dtype=torch.float64, generator=generator)).requires_grad_()
    for drift in (0.05, 2.0):  # either side of φ's series
        q = p.detach() + drift * torch.randn(3, 5, dtype=torch.float64, generator=generator)
        assert torch.autograd.gradcheck(lambda p, q: function(p, q, temperature=0.7), (p, q.requires_grad_()))
    assert torch.autograd.gradcheck(entropy, (p,))


def test_gradients_of_both_kls_are_the_textbook_ones() -> None:
    policy, reference = torch.randn(2, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    policy.requires_grad_()
    p, q = policy.detach().softmax(-1), reference.softmax(-1)
    ratio = p.log() - q.log()
    (reverse,) = torch.autograd.grad(reverse_kl(policy, reference).sum(), policy)
    torch.testing.assert_close(reverse, p * (ratio - (p * ratio).sum(-1, keepdim=True)))
    (forward,) = torch.autograd.grad(forward_kl(policy, reference).sum(), policy)
    torch.testing.assert_close(forward, p - q)


# --- masks ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", PAIRS)
def test_masks_of_logits(function: Callable[..., Tensor]) -> None:
    free_p, free_q = torch.tensor([[1.0, 0.5, -1.0], [0.3, 2.0, 0.1]], dtype=torch.float64)
    gap = torch.tensor([-INF], dtype=torch.float64)
    p = torch.cat([gap, free_p]).requires_grad_()
    q = torch.cat([gap, free_q]).requires_grad_()
    value = function(p, q)
    torch.testing.assert_close(value, function(free_p, free_q))
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(value, (p, q)))
    for left, right in (
        (p, torch.cat([torch.ones_like(gap), free_q])),
        (torch.cat([torch.ones_like(gap), free_p]), q),
    ):
        value = function(left, right)
        assert not value.isnan()
        for tensor in (each for each in (left, right) if each.requires_grad):
            (gradient,) = torch.autograd.grad(value, tensor)
            assert gradient.isfinite().all()
            assert value.isfinite() or not gradient.any()


def test_a_nan_is_never_hidden() -> None:
    p, q = torch.zeros(2, 3), torch.tensor([[0.0, math.nan, 0.0], [0.0, 0.0, 0.0]])
    for function in PAIRS:
        for value in (function(p, q), function(q, p)):
            assert value.isnan().tolist() == [True, False]
    assert entropy(q).isnan().tolist() == [True, False]


# --- refusals ------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("unchecked")
def test_refusals_say_what_is_wrong() -> None:
    p = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"\(2, 3\) and \(2, 4\)"):
        reverse_kl(p, torch.zeros(2, 4))
    with pytest.raises(ValueError, match="temperature is 0"):
        entropy(p, temperature=0.0)
    with pytest.raises(ValueError, match="unit is 'bytes'"):
        forward_kl(p, p, unit="bytes")
