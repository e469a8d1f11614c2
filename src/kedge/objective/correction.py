"""Importance weights that correct for a sampler whose log-probabilities differ from the trainer's."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kedge.objective.aggregate import per_response_sum, spread


@dataclass(frozen=True)
class Correction:
    """What is done with c = π_old/π_sampler, the mismatch between trainer and rollout engine.

    ``truncate``: min(c, high).   ``mask``: c inside [low, high], 0 outside.   ``none``: 1.
    At ``token`` level c is the token's own ratio; at ``sequence`` level the product over its response, which
    is unbiased for as long as no bound acts.

    Args:
        kind: Which of the three.
        level: What the ratio is taken over.
        low: Lower bound of the ratio, for ``mask``.
        high: Upper bound of the ratio; may be infinite.

    Raises:
        ValueError: Unless high is above 0 and, for ``mask``, 0 ≤ low < high.

    Source: Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training"
    (truncated weights); Zhao et al. 2025 (IcePop, masks).

    >>> Correction("truncate", high=2.0).level
    'token'
    """

    kind: Literal["none", "truncate", "mask"] = "none"
    level: Literal["token", "sequence"] = "token"
    low: float = 0.0
    high: float = math.inf

    def __post_init__(self) -> None:
        if not self.high > 0:
            raise ValueError(f"high must be above 0, got {self.high}")
        if self.kind == "mask" and not 0 <= self.low < self.high:  # what is only cut above has no lower bound
            raise ValueError(f"bounds need 0 ≤ low < high, got low={self.low}, high={self.high}")


def correction_weights(
    old_log_probs: Float[Tensor, " N"],
    sampler_log_probs: Float[Tensor, " N"],
    lengths: Int[Tensor, " R"],
    correction: Correction,
    mask: Bool[Tensor, " N"] | None = None,
) -> Float[Tensor, " N"]:
    """Return the weight of each token (see `Correction`), detached.

    Args:
        old_log_probs: log-probabilities by the trainer, of the policy as it was when the rollout was scored.
        sampler_log_probs: log-probabilities by the engine that drew the tokens.
        lengths: Tokens of each response.
        correction: What to do with the ratio.
        mask: Tokens drawn by the sampler; the others (a tool's, an environment's) count as ratio 1.

    Raises:
        ValueError: The lengths do not sum to N.

    >>> old, sampler = torch.tensor([0.5, 0.25]).log(), torch.tensor([0.25, 0.25]).log()
    >>> weights = correction_weights(old, sampler, torch.tensor([2]), Correction("truncate", "sequence"))
    >>> [round(weight, 6) for weight in weights.tolist()]
    [2.0, 2.0]
    """
    log_ratio = (old_log_probs - sampler_log_probs).detach()
    if mask is not None:
        log_ratio = torch.where(mask, log_ratio, 0.0)
    if correction.kind == "none":
        return torch.ones_like(log_ratio)
    if correction.level == "sequence":
        log_ratio = spread(per_response_sum(log_ratio, lengths), lengths)
    weights = log_ratio.exp()
    if correction.kind == "truncate":
        return weights.clamp(max=correction.high)
    inside = (weights >= correction.low) & (weights <= correction.high)
    return torch.where(inside, weights, 0.0)
