"""The formula of each exact divergence, on normalised log-probabilities.

With x = log q − log p and φ(x) = eˣ − 1 − x ≥ 0,

    KL(p‖q) = Σ p·φ(x)

is the textbook sum Σ p·(log p − log q), because Σ p·(eˣ − 1) = 0; but no two of its terms cancel, so that a
small KL keeps its digits in float32, and none is negative.

Masks. A log-probability of −∞ marks an entry that is not in the vocabulary. One that both distributions lack
counts 0. One that only p lacks counts q in KL(p‖q); one that only q lacks makes it infinite. No mask makes a
NaN, and the gradient of an infinite value is zero. A NaN that comes in stays a NaN.

Every function works on the last dimension and is differentiable in all its tensors; values are in nats.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

FAR = 1e20
"""Stands for ∞ in a log-ratio or a log-probability that a zero probability multiplies."""

_INF = math.inf


def excess_exponential(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return how far the exponential lies above its tangent at 0, to the last digits at every x.

        φ(x) = eˣ − 1 − x

    Args:
        x: any shape; ±∞ give ∞.

    Returns:
        φ(x) ≥ 0.

    >>> [f"{value:.4e}" for value in excess_exponential(torch.tensor([0.0, 1e-6, 1.0])).tolist()]
    ['0.0000e+00', '5.0000e-13', '7.1828e-01']
    """
    degree = 13 if x.dtype == torch.float64 else 8
    near = x.abs() < 0.3  # where expm1(x) − x would lose ε/|x|
    small, one = torch.where(near, x, 0.0), x.new_ones(())
    series = torch.ones_like(x)
    for k in range(degree, 2, -1):
        series = torch.addcmul(one, small, series, value=1 / k)
    elsewhere = torch.expm1(x) - x.clamp(max=torch.finfo(x.dtype).max)  # not ∞ − ∞
    return torch.where(near, 0.5 * small * small * series, elsewhere)


def finite_log_ratio(
    log_p: Float[Tensor, "*rows V"],
    log_q: Float[Tensor, "*rows V"],
    log_ratio: Float[Tensor, "*rows V"] | None = None,
) -> Float[Tensor, "*rows V"]:
    """Make the log-ratio x = log q − log p finite at masked entries, as the divergences below take it.

    Args:
        log_p: normalised log-probabilities, [..., V].
        log_q: the same of the other distribution.
        log_ratio: log q − log p where it is known more accurately than by subtraction.

    Returns:
        x, with 0 where both distributions lack the entry and ±1e20 where one does.

    >>> absent = -math.inf
    >>> finite_log_ratio(torch.tensor([absent, absent, 0.0]), torch.tensor([absent, -1.0, -2.0])).tolist()
    [0.0, 1.0000000200408773e+20, -2.0]
    """
    x = log_q - log_p if log_ratio is None else log_ratio
    return x.masked_fill((log_p == -_INF) & (log_q == -_INF), 0.0).clamp(-FAR, FAR)


def probability_difference(
    p: Float[Tensor, "*rows V"], q: Float[Tensor, "*rows V"], log_ratio: Float[Tensor, "*rows V"]
) -> Float[Tensor, "*rows V"]:
    """Subtract two probabilities, accurately where they are nearly equal.

        p − q = sign(−x)·max(p, q)·(1 − e^−|x|)

    Args:
        p: probabilities, [..., V].
        q: the same of the other distribution.
        log_ratio: x = log q − log p, finite.

    Returns:
        p − q, [..., V].

    >>> p, q = torch.tensor([0.75]), torch.tensor([0.25])
    >>> probability_difference(p, q, (q / p).log()).tolist()
    [0.5]
    """
    return torch.maximum(p, q) * torch.expm1(-log_ratio.abs()) * log_ratio.sign()


def entropy_from_log_probs(log_p: Float[Tensor, "*rows V"]) -> Float[Tensor, "*rows"]:
    """Entropy, in nats: H(p) = −Σ p·log p.

    >>> round(entropy_from_log_probs(torch.tensor([0.5, 0.5, 0.0]).log()).item(), 6)
    0.693147
    """
    return -(log_p.exp() * log_p.clamp(min=-FAR)).sum(-1)


def cross_entropy_from_log_probs(
    log_p: Float[Tensor, "*rows V"], log_q: Float[Tensor, "*rows V"]
) -> Float[Tensor, "*rows"]:
    """Cross-entropy, in nats: H(p, q) = −Σ p·log q.

    >>> p, q = torch.tensor([1.0, 0.0]), torch.tensor([0.5, 0.5])
    >>> round(cross_entropy_from_log_probs(p.log(), q.log()).item(), 6)
    0.693147
    """
    nats = -(log_p.exp() * log_q.clamp(min=-FAR)).sum(-1)
    return torch.where(_escapes(log_p, log_q), _INF, nats)


def kl_from_log_probs(
    log_p: Float[Tensor, "*rows V"],
    log_q: Float[Tensor, "*rows V"],
    log_ratio: Float[Tensor, "*rows V"] | None = None,
) -> Float[Tensor, "*rows"]:
    """Kullback–Leibler divergence, in nats.

        KL(p‖q) = Σ p·φ(x),   and for x > 1   p·φ(x) = q − p·(1 + x), which cannot overflow

    Args:
        log_p: normalised log-probabilities of the distribution that is averaged over, [..., V].
        log_q: the same of the other distribution.
        log_ratio: what ``finite_log_ratio(log_p, log_q)`` returns, if it is at hand.

    Returns:
        KL(p‖q) ≥ 0, [...].

    >>> p, q = torch.tensor([0.5, 0.5]), torch.tensor([0.25, 0.75])
    >>> round(kl_from_log_probs(p.log(), q.log()).item(), 6)
    0.143841
    """
    x = finite_log_ratio(log_p, log_q) if log_ratio is None else log_ratio
    nats = _excess_terms(log_p.exp(), log_q.exp(), x).sum(-1)
    return torch.where(_escapes(log_p, log_q), _INF, nats)


def total_variation_from_log_probs(
    log_p: Float[Tensor, "*rows V"],
    log_q: Float[Tensor, "*rows V"],
    log_ratio: Float[Tensor, "*rows V"] | None = None,
) -> Float[Tensor, "*rows"]:
    """Total variation distance, between 0 and 1: TV(p, q) = ½·Σ |p − q|.

    Args:
        log_p: normalised log-probabilities, [..., V].
        log_q: the same of the other distribution.
        log_ratio: what ``finite_log_ratio(log_p, log_q)`` returns, if it is at hand.

    Returns:
        TV, [...].

    >>> p, q = torch.tensor([0.5, 0.5]), torch.tensor([0.25, 0.75])
    >>> round(total_variation_from_log_probs(p.log(), q.log()).item(), 6)
    0.25
    """
    x = finite_log_ratio(log_p, log_q) if log_ratio is None else log_ratio
    return 0.5 * probability_difference(log_p.exp(), log_q.exp(), x).abs().sum(-1)


def jensen_shannon_from_log_probs(
    log_p: Float[Tensor, "*rows V"],
    log_q: Float[Tensor, "*rows V"],
    log_ratio: Float[Tensor, "*rows V"] | None = None,
) -> Float[Tensor, "*rows"]:
    """Jensen–Shannon divergence, in nats, between 0 and log 2.

        JS(p, q) = ½·KL(p‖m) + ½·KL(q‖m),   m = ½·(p + q)

    Args:
        log_p: normalised log-probabilities, [..., V].
        log_q: the same of the other distribution.
        log_ratio: what ``finite_log_ratio(log_p, log_q)`` returns, if it is at hand.

    Returns:
        JS, [...].

    >>> p, q = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    >>> round(jensen_shannon_from_log_probs(p.log(), q.log()).item(), 6)
    0.693147
    """
    x = finite_log_ratio(log_p, log_q) if log_ratio is None else log_ratio
    p, q = log_p.exp(), log_q.exp()
    mean = 0.5 * (p + q)
    terms = _excess_terms(p, mean, _log_mean_ratio(x)) + _excess_terms(q, mean, _log_mean_ratio(-x))
    return (0.5 * terms.sum(-1)).clamp(max=math.log(2.0))


def _excess_terms(p: Tensor, q: Tensor, x: Tensor) -> Tensor:
    """p·φ(x) for x = log q − log p; q where p is 0."""
    return torch.where(x > 1, q - p * (1 + x), p * excess_exponential(x.clamp(max=1)))


def _log_mean_ratio(x: Tensor) -> Tensor:
    """log(m/p) = log ½(1 + eˣ) for x = log q − log p, accurate near 0, without overflow."""
    return x.clamp(min=0) + torch.log1p(0.5 * torch.expm1(-x.abs()))


def _escapes(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Whether p has an entry that q lacks."""
    return ((log_q == -_INF) & (log_p > -_INF)).any(-1)
