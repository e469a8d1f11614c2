"""Sampled estimators: bias and spread in closed form, gradients by enumeration, behaviour far out."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kedge.divergence import (
    LINEAR_BEYOND,
    forward_kl,
    k1,
    k2,
    k3,
    reverse_kl,
    token_surrogate,
)

INF = math.inf

# --- values --------------------------------------------------------------------------------------------

# with p = N(0, 1) sampled and q = N(m, 1), KL = m²/2: bias/KL and standard deviation/KL in closed form
GAUSSIAN: dict[Callable[..., Tensor], tuple[Callable[[float], float], Callable[[float], float]]] = {
    k1: (lambda m: 0.0, lambda m: 2 / m),
    k2: (lambda m: m**2 / 4, lambda m: math.sqrt(2 + m**2)),
    k3: (lambda m: 0.0, lambda m: 2 * math.sqrt(math.expm1(m**2) - m**2) / m**2),
}


@pytest.mark.parametrize("estimator", GAUSSIAN)
@pytest.mark.parametrize("m", [0.1, 1.0, 3.0])
def test_bias_and_spread_between_gaussians(estimator: Callable[..., Tensor], m: float) -> None:
    a = torch.linspace(-20, 26, 200_001, dtype=torch.float64)
    step = (a[1] - a[0]).item()
    log_p = -0.5 * a**2 - 0.5 * math.log(2 * math.pi)
    log_q = -0.5 * (a - m) ** 2 - 0.5 * math.log(2 * math.pi)
    value, weight = estimator(log_p, log_q), log_p.exp() * step
    mean = (weight * value).sum().item()
    spread = math.sqrt((weight * (value - mean) ** 2).sum().item())
    bias, relative_spread = GAUSSIAN[estimator]
    kl = m**2 / 2
    assert (mean - kl) / kl == pytest.approx(bias(m), abs=1e-9)
    assert spread / kl == pytest.approx(relative_spread(m), rel=1e-6)


def test_k3_is_accurate_where_exp_minus_one_minus_x_is_not() -> None:
    log_reference = torch.tensor([1e-6])
    value = k3(torch.zeros(1), log_reference).item()
    assert value == pytest.approx(5e-13, rel=1e-5)
    naive = torch.exp(log_reference) - 1 - log_reference
    assert abs(naive.item()) > 1e-8


def test_k3_goes_on_in_a_straight_line() -> None:
    x = torch.tensor([LINEAR_BEYOND - 1e-9, LINEAR_BEYOND + 1e-9, 100.0, 101.0, 1e6], requires_grad=True)
    value = k3(-x, torch.zeros_like(x))
    assert value.isfinite().all()
    value.sum().backward()
    assert x.grad is not None
    slope = math.expm1(LINEAR_BEYOND)
    assert x.grad.tolist() == pytest.approx([slope] * 5, rel=1e-6)
    assert (value[3] - value[2]).item() == pytest.approx(slope, rel=1e-4)
    inside = torch.tensor([LINEAR_BEYOND - 1], dtype=torch.float64)
    assert k3(-inside, torch.zeros_like(inside)).item() == pytest.approx(math.expm1(29) - 29, rel=1e-12)


def test_the_line_far_out_leaves_small_gradients_alone() -> None:
    log_ratio = torch.tensor([1e-5, -1e-5, 1e-2, -3.0, 10.0], requires_grad=True)
    k3(log_ratio, torch.zeros_like(log_ratio)).sum().backward()
    assert log_ratio.grad is not None
    assert log_ratio.grad.tolist() == pytest.approx(
        (-torch.expm1(-log_ratio.detach().double())).tolist(), rel=1e-6
    )


def test_estimators_are_float32_at_least_and_survive_masks() -> None:
    half = torch.tensor([-1.0, -2.0]).bfloat16()
    masked = torch.tensor([-INF, -1.0, -INF])
    for estimator in (k1, k2, k3):
        assert estimator(half, half).dtype == torch.float32
        value = estimator(masked, torch.tensor([-INF, -INF, -1.0]))
        assert value[0] == 0
        assert not value.isnan().any()


# --- gradients, by enumeration of a vocabulary -----------------------------------------------------------


def enumerated(loss: Callable[[Tensor], Tensor], weights: Tensor, policy: Tensor) -> Tensor:
    """Σ_a weights(a)·∇ loss(a): the expected gradient with respect to the policy's logits."""
    (gradient,) = torch.autograd.grad((weights * loss(policy.log_softmax(-1))).sum(), policy)
    return gradient


@pytest.fixture
def tables() -> tuple[Tensor, Tensor, Tensor]:
    """Logits of the policy, the reference, the behaviour policy."""
    generator = torch.Generator().manual_seed(0)
    policy, reference, behaviour = torch.randn(3, 6, dtype=torch.float64, generator=generator)
    return policy.requires_grad_(), reference, behaviour


def test_what_the_derivative_of_each_estimator_estimates(tables: tuple[Tensor, Tensor, Tensor]) -> None:
    policy, reference, _ = tables
    on_policy, log_reference = policy.detach().softmax(-1), reference.log_softmax(-1)
    (reverse,) = torch.autograd.grad(reverse_kl(policy, reference), policy)
    (forward,) = torch.autograd.grad(forward_kl(policy, reference), policy)
    found = {
        each: enumerated(lambda p, f=each: f(p, log_reference), on_policy, policy) for each in (k1, k2, k3)
    }
    torch.testing.assert_close(found[k1], torch.zeros_like(found[k1]), rtol=0, atol=1e-15)
    torch.testing.assert_close(found[k2], reverse)
    torch.testing.assert_close(found[k3], forward)
    assert (forward - reverse).norm() > 0.3 * reverse.norm()  # so that the two can be told apart


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_token_surrogate_has_the_gradient_of_the_reverse_kl(
    estimator: str, tables: tuple[Tensor, Tensor, Tensor]
) -> None:
    policy, reference, behaviour = tables
    log_reference, log_behaviour = reference.log_softmax(-1), behaviour.log_softmax(-1)
    (truth,) = torch.autograd.grad(reverse_kl(policy, reference), policy)
    on_policy = enumerated(
        lambda p: token_surrogate(estimator, p, log_reference), policy.detach().softmax(-1), policy
    )
    torch.testing.assert_close(on_policy, truth)
    off_policy = enumerated(
        lambda p: token_surrogate(estimator, p, log_reference, log_behaviour), behaviour.softmax(-1), policy
    )
    torch.testing.assert_close(off_policy, truth)
    unweighted = enumerated(
        lambda p: token_surrogate(estimator, p, log_reference), behaviour.softmax(-1), policy
    )
    assert (unweighted - truth).norm() > 0.1 * truth.norm()


@pytest.mark.parametrize(("name", "estimator"), [("k1", k1), ("k2", k2), ("k3", k3)])
def test_token_surrogate_has_the_value_of_its_estimator(name: str, estimator: Callable[..., Tensor]) -> None:
    log_policy, log_reference, log_behaviour = -torch.rand(3, 8, generator=torch.Generator().manual_seed(1))
    value = token_surrogate(name, log_policy, log_reference, log_behaviour)
    torch.testing.assert_close(value, estimator(log_policy, log_reference), rtol=0, atol=0)


def test_token_surrogate_moves_nothing_but_the_policy() -> None:
    policy, reference, behaviour = (torch.tensor([-1.0, -2.0], requires_grad=True) for _ in range(3))
    token_surrogate("k2", policy, reference, behaviour).sum().backward()
    assert reference.grad is behaviour.grad is None


def test_token_surrogate_of_infinite_ratios_has_no_gradient() -> None:
    policy = torch.tensor([-1.0, -INF, -INF, -1.0], requires_grad=True)
    reference = torch.tensor([-INF, -1.0, -INF, -2.0])
    for name in ("k1", "k2", "k3"):
        policy.grad = None
        value = token_surrogate(name, policy, reference, torch.full((4,), -1.0))
        assert not value.isnan().any()
        value[value.isfinite()].sum().backward()
        assert policy.grad is not None
        assert policy.grad.tolist() == [0.0, 0.0, 0.0, 1.0]


def test_unknown_estimator() -> None:
    with pytest.raises(ValueError, match="estimator is 'k4'; it must be one of: k1, k2, k3"):
        token_surrogate("k4", torch.zeros(1), torch.zeros(1))
