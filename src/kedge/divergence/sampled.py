"""Sampled estimators of the reverse KL, from the log-probabilities of the sampled tokens.

With L = log π(a) − log ρ(a) for a token a drawn from π,

    k1 = L          unbiased; standard deviation far above the KL where the KL is small; may be negative
    k2 = ½·L²       biased (by + KL²/2 between Gaussians of equal width); never negative
    k3 = φ(−L)      = e^−L − 1 + L: unbiased; never negative; heavy-tailed where the KL is large

What they estimate is one thing, what their derivative estimates is another. Differentiated as they stand, the
expected gradient of k1 is 0, that of k2 is ∇KL(π‖ρ), and that of k3 is ∇KL(ρ‖π), the *forward* KL's.
``token_surrogate`` has the value of any of them, and the gradient of KL(π‖ρ) for all of them.

Every function is element-wise; all values are in nats per token.

Source: Schulman, "Approximating KL Divergence", joschu.net/blog/kl-approx.html.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from kedge.divergence.log_probs import excess_exponential

LINEAR_BEYOND = 30.0
"""Where −L exceeds this many nats, k3 goes on as its tangent: e³⁰ ≈ 10¹³ is large, but far from overflow."""


def k1(
    log_policy: Float[Tensor, "*tokens"], log_reference: Float[Tensor, "*tokens"]
) -> Float[Tensor, "*tokens"]:
    """Return the log-ratio itself: k1 = L = log π(a) − log ρ(a).

    Args:
        log_policy: log π(a) of the sampled tokens.
        log_reference: log ρ(a) of the same tokens.

    Returns:
        k1, in nats. Its own derivative has expectation 0: no anchor, if it is used as a loss.

    >>> k1(torch.tensor([-1.0]), torch.tensor([-3.0])).tolist()
    [2.0]
    """
    return _log_ratio(log_policy, log_reference)


def k2(
    log_policy: Float[Tensor, "*tokens"], log_reference: Float[Tensor, "*tokens"]
) -> Float[Tensor, "*tokens"]:
    """Return half the squared log-ratio: k2 = ½·L².

    Args:
        log_policy: log π(a) of the sampled tokens.
        log_reference: log ρ(a) of the same tokens.

    Returns:
        k2 ≥ 0, in nats. The expectation of its own derivative is ∇KL(π‖ρ), exactly, on-policy.

    >>> k2(torch.tensor([-1.0]), torch.tensor([-3.0])).tolist()
    [2.0]
    """
    return 0.5 * _log_ratio(log_policy, log_reference).square()


def k3(
    log_policy: Float[Tensor, "*tokens"], log_reference: Float[Tensor, "*tokens"]
) -> Float[Tensor, "*tokens"]:
    """Return the excess of the exponential: k3 = φ(−L) = e^−L − 1 + L.

    Where −L > c = ``LINEAR_BEYOND`` it goes on along its tangent, φ(c) + (eᶜ − 1)·(−L − c): it does not
    overflow, and its gradient does not vanish where the anchor is needed most, as that of a clamp would.

    Args:
        log_policy: log π(a) of the sampled tokens.
        log_reference: log ρ(a) of the same tokens.

    Returns:
        k3 ≥ 0, in nats. The expectation of its own derivative is ∇KL(ρ‖π), the forward KL's, on-policy.

    >>> [f"{value:.3g}" for value in k3(torch.tensor([-1.0, -50.0]), torch.tensor([-1.0, -1.0])).tolist()]
    ['0', '2.14e+14']
    """
    x = -_log_ratio(log_policy, log_reference)
    slope = math.expm1(LINEAR_BEYOND)
    near = excess_exponential(x.clamp(max=LINEAR_BEYOND))
    far = (slope - LINEAR_BEYOND) + slope * (x - LINEAR_BEYOND)
    # chosen, not summed up: the slope, added and taken off again, would swallow a small gradient
    return torch.where(x > LINEAR_BEYOND, far, near)


ESTIMATORS = {"k1": k1, "k2": k2, "k3": k3}


def token_surrogate(
    estimator: str,
    log_policy: Float[Tensor, "*tokens"],
    log_reference: Float[Tensor, "*tokens"],
    log_behaviour: Float[Tensor, "*tokens"] | None = None,
) -> Float[Tensor, "*tokens"]:
    """Give an estimator's value the gradient of the reverse KL, right per state on and off policy.

        value k(L),   gradient w·L·∇log π(a),   w = π(a)/μ(a)

    E_μ[w·L·∇log π] = E_π[L·∇log π] = ∇KL(π‖ρ) at each state, whichever estimator shows the value.

    Args:
        estimator: "k1", "k2" or "k3": the value.
        log_policy: log π(a) of the sampled tokens; the gradient goes here alone.
        log_reference: log ρ(a) of the same tokens.
        log_behaviour: log μ(a) of the policy that drew them; None means π itself, w = 1.

    Returns:
        The estimator's value, in nats; where w·L is not finite the gradient is zero.

    Raises:
        ValueError: if the estimator is unknown.

    Source: DeepSeek-AI, "DeepSeek-V3.2", 2025, for w·k3 with a differentiable w.

    >>> log_policy = torch.tensor([-1.0], requires_grad=True)
    >>> value = token_surrogate("k3", log_policy, torch.tensor([-1.5]))
    >>> value.sum().backward()
    >>> round(value.item(), 4), log_policy.grad.item()
    (0.1065, 0.5)
    """
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator is {estimator!r}; it must be one of: {', '.join(ESTIMATORS)}")
    fixed = log_policy.detach()
    slope = _log_ratio(fixed, log_reference.detach())
    if log_behaviour is not None:
        slope = slope * _log_ratio(fixed, log_behaviour.detach()).exp()
    finite = slope.isfinite() & fixed.isfinite()
    carrier = torch.where(finite, log_policy, 0.0)
    value = ESTIMATORS[estimator](fixed, log_reference.detach())
    return value + torch.where(finite, slope, 0.0) * (carrier - carrier.detach())


def _log_ratio(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Log p − log q in float32 at least; 0 where both are −∞."""
    ratio = log_p.to(torch.promote_types(log_p.dtype, torch.float32)) - log_q
    return ratio.masked_fill((log_p == -math.inf) & (log_q == -math.inf), 0.0)
