"""The formula of each exact divergence, on normalised log-probabilities.

With x = log q − log p and φ(x) = eˣ − 1 − x ≥ 0,

    KL(p‖q) = Σ p·φ(x)

is the textbook sum Σ p·(log p − log q), because Σ p·(eˣ − 1) = 0; but no two of its terms cancel, so that a
small KL keeps its digits in float32. None is negative, but for the rounding of numbers next to 0: no KL is.

Masks. A log-probability of −∞ marks an entry that is not in the vocabulary. One that both distributions lack
counts 0. One that only p lacks counts q in KL(p‖q); one that only q lacks makes it infinite. No mask makes a
NaN, and the gradient of an infinite value is zero. A NaN that comes in stays a NaN. Inside the formulas
``finite`` numbers stand for −∞, so that they hold for masked entries as they are written.

Every function works on the last dimension and is differentiable in all its tensors; values are in nats. Those
that compare two distributions take ``log_ratio``, log q − log p, where it is known more accurately than by
subtraction; then all three arguments must be ``finite``.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

FAR = 1e20
"""Stands for ∞: so far out that every probability is 0, near enough for 0·FAR to be 0."""

_NEAR = 0.25
"""Where φ is taken from its series; further out, eˣ − 1 − x has its digits."""


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
    elsewhere = torch.expm1(x) - x.clamp(max=torch.finfo(x.dtype).max)  # not ∞ − ∞
    near = x.abs() < _NEAR
    return torch.where(near, _excess_series(torch.where(near, x, 0.0)), elsewhere)


def finite(log_p: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Replace −∞ by −FAR: its probability and its gradient stay 0, but it can be multiplied and subtracted.

    >>> finite(torch.tensor([0.0, -math.inf])).tolist()
    [0.0, -1.0000000200408773e+20]
    """
    return log_p.clamp(min=-FAR)


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
    log_p = _wide(log_p)
    return -(log_p.exp() * finite(log_p)).sum(-1)


def cross_entropy_from_log_probs(
    log_p: Float[Tensor, "*rows V"], log_q: Float[Tensor, "*rows V"]
) -> Float[Tensor, "*rows"]:
    """Cross-entropy, in nats: H(p, q) = −Σ p·log q.

    >>> p, q = torch.tensor([1.0, 0.0]), torch.tensor([0.5, 0.5])
    >>> round(cross_entropy_from_log_probs(p.log(), q.log()).item(), 6)
    0.693147
    """
    log_p, log_q, x = _compared(log_p, log_q, None)
    return torch.where(_escapes(x), math.inf, -(log_p.exp() * log_q).sum(-1))


def kl_from_log_probs(
    log_p: Float[Tensor, "*rows V"],
    log_q: Float[Tensor, "*rows V"],
    log_ratio: Float[Tensor, "*rows V"] | None = None,
) -> Float[Tensor, "*rows"]:
    """Kullback–Leibler divergence, in nats: KL(p‖q) = Σ p·φ(x) ≥ 0.

    Args:
        log_p: log-probabilities of the distribution that is averaged over, [..., V].
        log_q: the same of the other distribution.
        log_ratio: x = log q − log p, if it is known more accurately; then all three must be finite.

    Returns:
        KL(p‖q), [...].

    >>> p, q = torch.tensor([0.5, 0.5]), torch.tensor([0.25, 0.75])
    >>> round(kl_from_log_probs(p.log(), q.log()).item(), 6)
    0.143841
    """
    log_p, log_q, x = _compared(log_p, log_q, log_ratio)
    total = _excess_terms(log_p.exp(), log_q.exp(), x).sum(-1).clamp(min=0)
    return torch.where(_escapes(x), math.inf, total)


def total_variation_from_log_probs(
    log_p: Float[Tensor, "*rows V"],
    log_q: Float[Tensor, "*rows V"],
    log_ratio: Float[Tensor, "*rows V"] | None = None,
) -> Float[Tensor, "*rows"]:
    """Total variation distance, between 0 and 1: TV(p, q) = ½·Σ |p − q|.

    Args:
        log_p: log-probabilities, [..., V].
        log_q: the same of the other distribution.
        log_ratio: log q − log p, if it is known more accurately; then all three must be finite.

    Returns:
        TV, [...].

    >>> p, q = torch.tensor([0.5, 0.5]), torch.tensor([0.25, 0.75])
    >>> round(total_variation_from_log_probs(p.log(), q.log()).item(), 6)
    0.25
    """
    log_p, log_q, x = _compared(log_p, log_q, log_ratio)
    return (0.5 * probability_difference(log_p.exp(), log_q.exp(), x).abs().sum(-1)).clamp(max=1.0)


def jensen_shannon_from_log_probs(
    log_p: Float[Tensor, "*rows V"],
    log_q: Float[Tensor, "*rows V"],
    log_ratio: Float[Tensor, "*rows V"] | None = None,
) -> Float[Tensor, "*rows"]:
    """Jensen–Shannon divergence, in nats, between 0 and log 2.

        JS(p, q) = ½·KL(p‖m) + ½·KL(q‖m),   m = ½·(p + q)

    Args:
        log_p: log-probabilities, [..., V].
        log_q: the same of the other distribution.
        log_ratio: log q − log p, if it is known more accurately; then all three must be finite.

    Returns:
        JS, [...].

    >>> p, q = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    >>> round(jensen_shannon_from_log_probs(p.log(), q.log()).item(), 6)
    0.693147
    """
    log_p, log_q, x = _compared(log_p, log_q, log_ratio)
    p, q = log_p.exp(), log_q.exp()
    mean = 0.5 * (p + q)
    terms = _excess_terms(p, mean, _log_mean_ratio(x)) + _excess_terms(q, mean, _log_mean_ratio(-x))
    return (0.5 * terms.sum(-1)).clamp(min=0.0, max=math.log(2.0))


def _compared(log_p: Tensor, log_q: Tensor, log_ratio: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return finite log p, log q and x = log q − log p: ±FAR where one of them lacks the entry, 0 where both do.

    In float32 at least: half precision has no room for FAR, and sums over a vocabulary would lose their digits in it.
    """
    if log_ratio is not None:
        return _wide(log_p), _wide(log_q), _wide(log_ratio)
    log_p, log_q = finite(_wide(log_p)), finite(_wide(log_q))
    return log_p, log_q, log_q - log_p


def _wide(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _escapes(x: Tensor) -> Tensor:
    """Whether p has an entry that q lacks."""
    return x.amin(-1) < -0.5 * FAR


def _excess_series(x: Tensor) -> Tensor:
    """φ(x) for |x| ≤ ¼, where eˣ − 1 − x would lose ε/|x|: x²·Σ xᵏ/(k + 2)!, two terms at a time."""
    square = x.square()
    terms = 12 if x.dtype == torch.float64 else 6
    pairs = [1 / math.factorial(k + 2) + x * (1 / math.factorial(k + 3)) for k in range(0, terms, 2)]
    series = pairs.pop()
    while pairs:
        series = series * square + pairs.pop()
    return series * square


def _excess_terms(p: Tensor, q: Tensor, x: Tensor) -> Tensor:
    """p·φ(x) for x = log q − log p, without overflow where x is large; q where p is 0."""
    near = x.abs() < _NEAR
    return torch.where(near, p * _excess_series(torch.where(near, x, 0.0)), q - p * (1 + x))


def _log_mean_ratio(x: Tensor) -> Tensor:
    """log(m/p) = log ½(1 + eˣ) for x = log q − log p, accurate near 0, without overflow."""
    return x.clamp(min=0) + torch.log1p(0.5 * torch.expm1(-x.abs()))
