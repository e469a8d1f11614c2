"""Exact divergences over a vocabulary, from logits.

The formulas, and what they make of masked entries (a logit of −∞), are those of ``log_probs``. One entry at
least must be left unmasked. Every function works on the last dimension, in float32 at least, and is
differentiable in all its tensors.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from kedge.divergence.log_probs import (
    cross_entropy_from_log_probs,
    entropy_from_log_probs,
    finite,
    jensen_shannon_from_log_probs,
    kl_from_log_probs,
    total_variation_from_log_probs,
)

_NATS = {"nats": 1.0, "bits": math.log(2.0)}  # nats in one unit


class Normalizer(NamedTuple):
    """The log-normaliser of logits in two parts, log Σ eˡ = maximum + log_sum, [..., 1] each.

    A small KL is lost if they are added up before those of another distribution are subtracted.
    """

    maximum: Tensor
    log_sum: Tensor

    def log_probs(self, logits: Tensor) -> Tensor:
        """Return the log-probabilities of the logits that this normalises."""
        return (logits - self.maximum) - self.log_sum


def normalizer(logits: Float[Tensor, "*rows V"], maximum: Tensor | None = None) -> Normalizer:
    """Return the two parts of log Σ eˡ = m + log(n + Σ e^(l − m)), the sum over all but the n maxima m.

    Kept out of the sum, the maxima do not drown the others: a peaked row keeps its digits, too.

    Args:
        logits: [..., V].
        maximum: m, [..., 1], where it is known already.

    >>> maximum, log_sum = normalizer(torch.tensor([1000.0, 1000.0]))
    >>> maximum.item(), round(log_sum.item(), 6)
    (1000.0, 0.693147)
    """
    if maximum is None:
        maximum = logits.amax(-1, keepdim=True)
    powers = (logits - maximum).exp()  # 1 at each maximum, and below 1 elsewhere
    whole = powers.floor()
    count, others = whole.sum(-1, keepdim=True), (powers - whole).sum(-1, keepdim=True)
    return Normalizer(maximum, count.log() + (others / count).log1p())


def log_ratio_of_logits(
    p_logits: Tensor, p_normalizer: Normalizer, q_logits: Tensor, q_normalizer: Normalizer
) -> Tensor:
    """Return log q − log p, taken where most digits are left: logits, less the maxima, less the rest.

    At a maximum of both the first two leave nothing, and what remains, the logarithm of the odds against everything
    else, may be as small as it likes: taken together with the maxima it would be rounded away.

    >>> p, q = torch.tensor([1000.0, 1001.0]), torch.tensor([1000.0, 1001.5])
    >>> [round(x, 5) for x in log_ratio_of_logits(p, normalizer(p), q, normalizer(q)).tolist()]
    [-0.38815, 0.11185]
    """
    below_maxima = (q_logits - p_logits) - (q_normalizer.maximum - p_normalizer.maximum)
    return below_maxima - (q_normalizer.log_sum - p_normalizer.log_sum)


def entropy(
    logits: Float[Tensor, "*rows V"], *, temperature: float = 1.0, unit: str = "nats"
) -> Float[Tensor, "*rows"]:
    """Entropy of a distribution: H(p) = −Σ p·log p.

    Args:
        logits: [..., V].
        temperature: the logits are divided by it.
        unit: "nats" or "bits".

    Returns:
        H(p), [...], in ``unit``.

    Raises:
        ValueError: if the temperature is not above 0, or the unit is unknown.

    Source: Shannon, "A Mathematical Theory of Communication", 1948.

    >>> entropy(torch.zeros(4), unit="bits").item()
    2.0
    """
    logits = _tempered(logits, temperature)
    return _in_unit(entropy_from_log_probs(normalizer(logits).log_probs(logits)), unit)


def cross_entropy(
    p_logits: Float[Tensor, "*rows V"],
    q_logits: Float[Tensor, "*rows V"],
    *,
    temperature: float = 1.0,
    unit: str = "nats",
) -> Float[Tensor, "*rows"]:
    """Cross-entropy: H(p, q) = −Σ p·log q = H(p) + KL(p‖q).

    Args:
        p_logits: logits of the distribution that is averaged over, [..., V].
        q_logits: logits of the distribution that is scored, [..., V].
        temperature: both logits are divided by it.
        unit: "nats" or "bits".

    Returns:
        H(p, q), [...], in ``unit``.

    Raises:
        ValueError: if the shapes differ, the temperature is not above 0, or the unit is unknown.

    Source: Cover, Thomas, "Elements of Information Theory", 2006, chapter 2.

    >>> cross_entropy(torch.zeros(4), torch.zeros(4), unit="bits").item()
    2.0
    """
    log_p, log_q, _ = _compare(p_logits, q_logits, temperature)
    return _in_unit(cross_entropy_from_log_probs(log_p, log_q), unit)


def reverse_kl(
    policy_logits: Float[Tensor, "*rows V"],
    reference_logits: Float[Tensor, "*rows V"],
    *,
    temperature: float = 1.0,
    unit: str = "nats",
) -> Float[Tensor, "*rows"]:
    """Reverse, mode-seeking KL of a policy to its reference: KL(π‖ρ) = Σ π·(log π − log ρ).

    Args:
        policy_logits: logits of π, [..., V].
        reference_logits: logits of ρ, [..., V].
        temperature: both logits are divided by it.
        unit: "nats" or "bits".

    Returns:
        KL(π‖ρ) ≥ 0, [...], in ``unit`` per row (one row is one token).

    Raises:
        ValueError: if the shapes differ, the temperature is not above 0, or the unit is unknown.

    Source: Kullback, Leibler, "On Information and Sufficiency", 1951.

    >>> policy, reference = torch.tensor([0.5, 0.5]), torch.tensor([0.25, 0.75])
    >>> round(reverse_kl(policy.log(), reference.log()).item(), 6)
    0.143841
    """
    return _in_unit(kl_from_log_probs(*_compare(policy_logits, reference_logits, temperature)), unit)


def forward_kl(
    policy_logits: Float[Tensor, "*rows V"],
    reference_logits: Float[Tensor, "*rows V"],
    *,
    temperature: float = 1.0,
    unit: str = "nats",
) -> Float[Tensor, "*rows"]:
    """Forward, mode-covering KL of a policy to its reference: KL(ρ‖π) = Σ ρ·(log ρ − log π).

    Args:
        policy_logits: logits of π, [..., V].
        reference_logits: logits of ρ, [..., V].
        temperature: both logits are divided by it.
        unit: "nats" or "bits".

    Returns:
        KL(ρ‖π) ≥ 0, [...], in ``unit`` per row (one row is one token).

    Raises:
        ValueError: if the shapes differ, the temperature is not above 0, or the unit is unknown.

    Source: Kullback, Leibler, "On Information and Sufficiency", 1951.

    >>> policy, reference = torch.tensor([0.5, 0.5]), torch.tensor([0.25, 0.75])
    >>> round(forward_kl(policy.log(), reference.log()).item(), 6)
    0.130812
    """
    log_p, log_q, x = _compare(policy_logits, reference_logits, temperature)
    return _in_unit(kl_from_log_probs(log_q, log_p, -x), unit)


def jensen_shannon(
    p_logits: Float[Tensor, "*rows V"],
    q_logits: Float[Tensor, "*rows V"],
    *,
    temperature: float = 1.0,
    unit: str = "nats",
) -> Float[Tensor, "*rows"]:
    """Jensen–Shannon divergence: ½·KL(p‖m) + ½·KL(q‖m) with m = ½·(p + q), finite whatever is masked.

    Args:
        p_logits: [..., V].
        q_logits: [..., V].
        temperature: both logits are divided by it.
        unit: "nats" or "bits".

    Returns:
        JS(p, q) between 0 and log 2 nats (1 bit), [...], in ``unit``.

    Raises:
        ValueError: if the shapes differ, the temperature is not above 0, or the unit is unknown.

    Source: Lin, "Divergence measures based on the Shannon entropy", 1991.

    >>> jensen_shannon(torch.tensor([0.0, -math.inf]), torch.tensor([-math.inf, 0.0]), unit="bits").item()
    1.0
    """
    return _in_unit(jensen_shannon_from_log_probs(*_compare(p_logits, q_logits, temperature)), unit)


def total_variation(
    p_logits: Float[Tensor, "*rows V"], q_logits: Float[Tensor, "*rows V"], *, temperature: float = 1.0
) -> Float[Tensor, "*rows"]:
    """Total variation distance: TV(p, q) = ½·Σ |p − q|, the most that any event's probability differs by.

    Args:
        p_logits: [..., V].
        q_logits: [..., V].
        temperature: both logits are divided by it.

    Returns:
        TV between 0 and 1, [...].

    Raises:
        ValueError: if the shapes differ, or the temperature is not above 0.

    Source: Levin, Peres, "Markov Chains and Mixing Times", 2017, chapter 4.

    >>> p, q = torch.tensor([0.5, 0.5]), torch.tensor([0.25, 0.75])
    >>> round(total_variation(p.log(), q.log()).item(), 6)
    0.25
    """
    return total_variation_from_log_probs(*_compare(p_logits, q_logits, temperature))


def _tempered(logits: Tensor, temperature: float) -> Tensor:
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; it must be above 0")
    return finite(logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature)


def _compare(p_logits: Tensor, q_logits: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return finite log p, log q and log q − log p."""
    if p_logits.shape != q_logits.shape:
        raise ValueError(
            f"the logits have shapes {tuple(p_logits.shape)} and {tuple(q_logits.shape)}; "
            "both distributions need the same rows and the same vocabulary"
        )
    p_logits, q_logits = _tempered(p_logits, temperature), _tempered(q_logits, temperature)
    p_normalizer, q_normalizer = normalizer(p_logits), normalizer(q_logits)
    log_p, log_q = p_normalizer.log_probs(p_logits), q_normalizer.log_probs(q_logits)
    return log_p, log_q, log_ratio_of_logits(p_logits, p_normalizer, q_logits, q_normalizer)


def _in_unit(nats: Tensor, unit: str) -> Tensor:
    if unit not in _NATS:
        raise ValueError(f"unit is {unit!r}; it must be one of: {', '.join(_NATS)}")
    return nats / _NATS[unit]
