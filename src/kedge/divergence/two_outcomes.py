"""Divergences that the sampled token alone gives away: between {a, not a} under one policy or another.

To merge all other tokens into one outcome can only bring two distributions closer together, so these are lower
bounds of the divergences over the vocabulary, and equal to them where the vocabulary has two entries. They are
for measuring: no gradient goes through them.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from kedge.divergence.log_probs import finite, kl_from_log_probs, probability_difference


def two_outcome_total_variation(
    log_p: Float[Tensor, "*tokens"], log_q: Float[Tensor, "*tokens"]
) -> Float[Tensor, "*tokens"]:
    """Total variation distance of {a, not a}: |p(a) − q(a)|, at most TV(p, q).

    Args:
        log_p: log p(a) of the sampled tokens.
        log_q: log q(a) of the same tokens.

    Returns:
        The distance, between 0 and 1; detached.

    Source: Qi et al. 2026, "Rethinking the Trust Region in LLM Reinforcement Learning", arXiv 2602.04879.

    >>> p, q = torch.tensor([0.75]), torch.tensor([0.25])
    >>> two_outcome_total_variation(p.log(), q.log()).tolist()
    [0.5]
    """
    log_p, log_q = _wide(log_p), _wide(log_q)
    return probability_difference(log_p.exp(), log_q.exp(), log_q - log_p).abs()


def two_outcome_kl(
    log_p: Float[Tensor, "*tokens"], log_q: Float[Tensor, "*tokens"]
) -> Float[Tensor, "*tokens"]:
    """Kullback–Leibler divergence of {a, not a}, in nats, at most KL(p‖q).

        p(a)·log(p(a)/q(a)) + (1 − p(a))·log((1 − p(a))/(1 − q(a)))

    Args:
        log_p: log p(a) of the sampled tokens, p being what is averaged over.
        log_q: log q(a) of the same tokens.

    Returns:
        The divergence, at least 0; infinite where q(a) is 0 or 1 and p(a) is not; detached.

    Source: Qi et al. 2026, arXiv 2602.04879.

    >>> p, q = torch.tensor([0.5]), torch.tensor([0.25])
    >>> round(two_outcome_kl(p.log(), q.log()).item(), 6)
    0.143841
    """
    log_p, log_q = _wide(log_p), _wide(log_q)
    rest_p, rest_q = _log_rest(log_p), _log_rest(log_q)
    ratio, rest_ratio = log_q - log_p, rest_q - rest_p
    # close by, the difference of two logarithms would keep too few digits of their small difference
    moved = probability_difference(log_p.exp(), log_q.exp(), ratio) / -torch.expm1(log_p)
    near = (rest_ratio.abs() < 0.5) & (log_p < 0)
    rest_ratio = torch.where(near, torch.log1p(moved), rest_ratio)
    pairs = ((log_p, rest_p), (log_q, rest_q), (ratio, rest_ratio))
    return kl_from_log_probs(*(torch.stack(pair, dim=-1) for pair in pairs))


def _wide(log_p: Tensor) -> Tensor:
    """Detach, in float32 at least, −∞ made finite; rounding may have left a probability above 1."""
    log_p = log_p.detach()
    return finite(log_p.to(torch.promote_types(log_p.dtype, torch.float32)).clamp(max=0.0))


def _log_rest(log_p: Tensor) -> Tensor:
    """log(1 − p), to the last digits at both ends."""
    near = log_p > -math.log(2.0)
    return finite(torch.where(near, (-torch.expm1(log_p)).log(), torch.log1p(-log_p.exp())))
