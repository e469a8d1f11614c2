"""Trust region by measured divergence: tokens or responses that have gone too far teach nothing more."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kedge.divergence import two_outcome_kl, two_outcome_total_variation
from kedge.objective.aggregate import pad, spread, valid_positions

HEAD_OUTPUTS = {"tv": "old.total_variation", "kl": "old.forward_kl"}
"""What measures the divergence exactly; the head's KL(anchor‖policy) is KL(μ‖π) for the anchor ``old``."""
TWO_OUTCOMES = {"tv": two_outcome_total_variation, "kl": two_outcome_kl}


@dataclass(frozen=True)
class DivergenceMask:
    """Which tokens drop out of the surrogate once the policy π is too far from the old policy μ.

    With D_t the divergence of μ(·|s_t) and π(·|s_t), A the advantage, w = π/μ of the token that was drawn::

        token     the token, where D_t > δ and the update would go on: A > 0 and w > 1, or A < 0 and w < 1
        response  all tokens of the response, where max_t D_t > δ

    It acts on the surrogate alone, whatever its ratio, and beside its clipping: a penalty, an anchor or an
    entropy bonus still holds the tokens that are dropped. The weights stay as they are, so that what is dropped
    counts as a zero.

    Args:
        measure: ``tv`` is the total variation, ``kl`` is KL(μ‖π) in nats.
        threshold: δ > 0; below 1 for ``tv``.
        level: Which of the two.
        form: ``exact`` over the vocabulary, from the head's outputs for an anchor named ``old``; ``two_outcome``
            for the sampled token against all others, which the two log-probabilities suffice for.

    Raises:
        ValueError: A threshold that is not above 0 and finite, or that a total variation cannot pass.

    Source: Qi et al. 2026 (DPPO), arXiv 2602.04879, for ``token`` and ``two_outcome``; Trust Region Masking, 2025,
    arXiv 2512.23075, for ``response``.

    >>> sorted(DivergenceMask("kl", 0.05).outputs)
    ['old.forward_kl']
    """

    measure: Literal["tv", "kl"]
    threshold: float
    level: Literal["token", "response"] = "token"
    form: Literal["exact", "two_outcome"] = "exact"

    def __post_init__(self) -> None:
        if not (self.threshold > 0 and math.isfinite(self.threshold)):
            raise ValueError(f"threshold must be a finite number above 0, got {self.threshold}")
        if self.measure == "tv" and self.threshold >= 1:
            raise ValueError(
                f"a total variation is at most 1, so that a threshold of {self.threshold} would mask nothing; "
                "give one below 1"
            )

    @property
    def outputs(self) -> frozenset[str]:
        """Outputs of the head that the divergence is measured by."""
        return frozenset({HEAD_OUTPUTS[self.measure] if self.form == "exact" else "log_prob"})


def divergences(
    mask: DivergenceMask,
    scores: Mapping[str, Tensor],
    behaviour_log_probs: Float[Tensor, " N"] | None,
) -> Float[Tensor, " N"]:
    """Return D_t at each token, detached (see `DivergenceMask`).

    Args:
        mask: Which divergence, in which form.
        scores: `DivergenceMask.outputs`, as the head gives them.
        behaviour_log_probs: log μ of the tokens; None on policy: the two-outcome forms are 0.

    >>> scores, behaviour = {"log_prob": torch.tensor([0.75]).log()}, torch.tensor([0.5]).log()
    >>> divergences(DivergenceMask("tv", 0.1, form="two_outcome"), scores, behaviour).tolist()
    [0.25]
    """
    (name,) = mask.outputs
    if mask.form == "exact":
        return scores[name].detach()
    log_prob = scores[name].detach()
    if behaviour_log_probs is None:
        return torch.zeros_like(log_prob)
    return TWO_OUTCOMES[mask.measure](behaviour_log_probs, log_prob)


def kept_tokens(
    mask: DivergenceMask,
    divergence: Float[Tensor, " N"],
    log_ratio: Float[Tensor, " N"],
    advantages: Float[Tensor, " N"],
) -> Bool[Tensor, " N"]:
    """Return which tokens a mask of level ``token`` keeps.

    Args:
        mask: The threshold.
        divergence: D_t of each token.
        log_ratio: log w of each token.
        advantages: Advantage of each token.

    >>> ones = torch.ones(3)
    >>> kept_tokens(DivergenceMask("kl", 0.1), 0.2 * ones, torch.tensor([1.0, 1.0, -1.0]), torch.tensor([1, -1, -1.0]))
    tensor([False,  True, False])
    """
    return ~((divergence > mask.threshold) & (advantages * log_ratio > 0))


def kept_responses(
    mask: DivergenceMask,
    divergence: Float[Tensor, " N"],
    drawn: Bool[Tensor, " N"],
    lengths: Int[Tensor, " R"],
) -> Bool[Tensor, " N"]:
    """Return the tokens of the responses that a mask of level ``response`` keeps.

    Args:
        mask: The threshold.
        divergence: D_t of each token.
        drawn: Tokens that the policy drew; no other is looked at.
        lengths: Tokens of each response.

    >>> divergence, drawn = torch.tensor([0.0, 0.3, 0.1]), torch.ones(3, dtype=torch.bool)
    >>> kept_responses(DivergenceMask("kl", 0.2), divergence, drawn, torch.tensor([2, 1])).tolist()
    [False, False, True]
    """
    far = drawn & (divergence > mask.threshold)
    passed = pad(far.to(divergence.dtype), valid_positions(lengths, divergence.numel())).sum(dim=1)
    return spread(passed == 0, lengths)
