"""The formulas on log-probabilities: φ to the last digits, masks, differences of nearly equal probabilities."""

from __future__ import annotations

import math
from decimal import Decimal, localcontext

import pytest
import torch
from torch import Tensor

from kedge import divergence
from kedge.divergence import FAR, excess_exponential, finite, log_probs, probability_difference
from kedge.divergence.log_probs import entropy_from_log_probs, jensen_shannon_from_log_probs

INF = math.inf


def true_excess(x: float) -> float:
    """φ(x) with 60 digits."""
    with localcontext() as context:
        context.prec = 60
        exact = Decimal(x)
        return float(exact.exp() - 1 - exact)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 6e-7), (torch.float64, 2e-15)])
def test_excess_exponential_is_accurate_at_every_x(dtype: torch.dtype, tolerance: float) -> None:
    magnitudes = torch.cat(
        [torch.logspace(-8, 1.9, 400, dtype=dtype), torch.linspace(0.9, 1.1, 101, dtype=dtype)]
    )
    x = torch.cat([magnitudes, -magnitudes])
    truth = torch.tensor([true_excess(value) for value in x.tolist()], dtype=torch.float64)
    assert ((excess_exponential(x) - truth) / truth).abs().max() < tolerance


def test_excess_exponential_at_its_ends() -> None:
    values = excess_exponential(torch.tensor([-INF, 0.0, 100.0, INF, math.nan]))
    assert values[:4].tolist() == [INF, 0.0, INF, INF]
    assert values[4].isnan()


def test_excess_exponential_has_the_derivative_expm1() -> None:
    x = torch.tensor(
        [-50.0, -1.01, -0.99, -0.2, 0.0, 1e-4, 0.99, 1.01, 5.0], dtype=torch.float64, requires_grad=True
    )
    excess_exponential(x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, torch.expm1(x.detach()), rtol=1e-12, atol=0)


def test_finite_log_probs_have_the_gradient_of_a_constant_where_masked() -> None:
    log_p = torch.tensor([-INF, -1.0, math.nan], requires_grad=True)
    value = finite(log_p)
    torch.testing.assert_close(value, torch.tensor([-FAR, -1.0, math.nan]), equal_nan=True)
    value.sum().backward()
    assert log_p.grad is not None
    assert log_p.grad[:2].tolist() == [0.0, 1.0]


def test_probability_difference_keeps_digits_that_subtraction_loses() -> None:
    log_p = torch.linspace(-15, -0.1, 500, dtype=torch.float64).float()
    x = torch.full_like(log_p, 1e-4)
    p, q = log_p.exp(), (log_p + x).exp()
    truth = -log_p.double().exp() * torch.expm1(x.double())
    error = (probability_difference(p, q, x) - truth).abs() / truth.abs()
    naive = ((p - q) - truth).abs() / truth.abs()
    assert error.max() < 1e-6 < 1e-3 < naive.max()
    torch.testing.assert_close(probability_difference(q, p, -x), -probability_difference(p, q, x))


def pair(*columns: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """Log-probabilities of p and q, from their probabilities entry by entry."""
    table = torch.tensor(columns, dtype=torch.float64).log()
    return table[:, 0].clone().requires_grad_(), table[:, 1].clone().requires_grad_()


# p and q entry by entry, then: KL(p‖q), cross-entropy H(p, q), TV, JS, by hand
MASKS = {
    "masked in both": (
        [(0.5, 0.25), (0.5, 0.75), (0, 0)],
        0.5 * math.log(4 / 3),
        0.5 * math.log(16 / 3),
        0.25,
        None,
    ),
    "masked in p": ([(1, 0.25), (0, 0.75)], math.log(4), math.log(4), 0.75, None),
    "masked in q": ([(0.5, 1), (0.5, 0)], INF, INF, 0.5, None),
    "disjoint": ([(1, 0), (0, 1)], INF, INF, 1.0, math.log(2)),
}


@pytest.mark.parametrize("name", MASKS)
def test_masks(name: str) -> None:
    columns, kl, cross_entropy, variation, jensen_shannon = MASKS[name]
    log_p, log_q = pair(*columns)
    values = {
        kl: divergence.kl_from_log_probs(log_p, log_q),
        cross_entropy: divergence.cross_entropy_from_log_probs(log_p, log_q),
        variation: divergence.total_variation_from_log_probs(log_p, log_q),
    }
    if jensen_shannon is not None:
        values[jensen_shannon] = divergence.jensen_shannon_from_log_probs(log_p, log_q)
    values[-sum(p * math.log(p) for p, _ in columns if p)] = divergence.entropy_from_log_probs(log_p)
    for truth, value in values.items():
        assert value.item() == pytest.approx(truth, abs=1e-15)
        gradients = torch.autograd.grad(value, (log_p, log_q), allow_unused=True)
        for gradient in gradients:
            assert gradient is None or gradient.isfinite().all()
            assert gradient is None or math.isfinite(truth) or not gradient.any()


def test_an_entry_masked_in_p_alone_pulls_on_q() -> None:
    log_p, log_q = pair((1, 0.25), (0, 0.75))
    divergence.kl_from_log_probs(log_p, log_q).backward()
    assert log_q.grad is not None
    # Σ p·φ(x) as a function of free log q: q − p at every entry, q where p is 0
    torch.testing.assert_close(log_q.grad, torch.tensor([-0.75, 0.75], dtype=torch.float64))


def test_an_underflowing_probability_is_not_a_mask() -> None:
    log_p, log_q = torch.tensor([0.0, -200.0]), torch.tensor([-200.0, 0.0])
    assert divergence.kl_from_log_probs(log_p, log_q).item() == pytest.approx(200.0, rel=1e-6)
    assert divergence.entropy_from_log_probs(log_p).item() == 0.0
    assert divergence.kl_from_log_probs(log_p, torch.tensor([0.0, -INF])).item() == INF


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_read_as_float32(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    log_p, log_q = (torch.randn(3, 50, generator=generator).log_softmax(-1).to(dtype) for _ in range(2))
    log_p[:, 0] = -INF
    names = ("kl", "cross_entropy", "total_variation", "jensen_shannon")
    for name in names:
        function = getattr(log_probs, f"{name}_from_log_probs")
        found = function(log_p, log_q)
        assert found.dtype == torch.float32
        assert torch.equal(found, function(log_p.float(), log_q.float()))
    assert torch.equal(entropy_from_log_probs(log_p), entropy_from_log_probs(log_p.float()))


def test_jensen_shannon_of_numbers_next_to_zero_is_not_negative() -> None:
    """Seen to be −1.4e−45 in some of these rows."""
    generator = torch.Generator().manual_seed(0)
    log_p = -102 + torch.randn(20_000, 8, generator=generator)
    log_q = log_p + 0.3 * torch.randn(20_000, 8, generator=generator)
    log_p[:, 0] = log_q[:, 0] = 0.0
    assert bool((jensen_shannon_from_log_probs(log_p, log_q) >= 0).all())
