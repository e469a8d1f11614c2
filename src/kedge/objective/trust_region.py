"""The trust region around the behaviour policy: which surrogate of the policy gradient is maximised."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor


@dataclass(frozen=True)
class TrustRegion:
    """How far the ratio w = π/μ of policy to behaviour policy may carry the update.

    With A the advantage, to be maximised per token::

        clip      min(w A, clip(w, 1−low, 1+high) A)      and at least dual·A where A < 0, if dual is set
        sequence  the same with one ratio a response: sg[s]·π/sg[π], s = exp(mean_t log w_t)
        cispo     sg[clip(w, 1−low, 1+high)] · A · log π
        none      w A

    Args:
        kind: Which of the four.
        low: Largest relative decrease of the ratio; 1 or more leaves it without a lower bound.
        high: Largest relative increase of the ratio; may be infinite.
        dual: Bound c > 1 of dual clip, for ``clip`` and ``sequence``.

    Raises:
        ValueError: Negative bounds, or ``dual`` not above 1, or where it would do nothing.

    Source: Schulman et al. 2017, arXiv 1707.06347 (clip); Yu et al. 2025, arXiv 2503.14476 (two bounds);
    Ye et al. 2020, arXiv 1912.09729 (dual clip); Zheng et al. 2025, arXiv 2507.18071 (sequence);
    MiniMax 2025, arXiv 2506.13585 (CISPO).

    >>> TrustRegion("clip", low=0.2, high=0.28).high
    0.28
    """

    kind: Literal["clip", "sequence", "cispo", "none"] = "clip"
    low: float = 0.2
    high: float = 0.2
    dual: float | None = None

    def __post_init__(self) -> None:
        if not (self.low >= 0 and self.high >= 0):
            raise ValueError(f"bounds must not be negative, got low={self.low}, high={self.high}")
        if self.dual is None:
            return
        if self.kind in ("cispo", "none"):
            raise ValueError(f"dual clip does nothing in trust region {self.kind!r}; leave it out")
        if not self.dual > 1:
            raise ValueError(f"dual must be above 1, got {self.dual}")


def ratio(
    log_prob: Float[Tensor, " N"],
    behaviour_log_probs: Float[Tensor, " N"] | None,
    sequence_log_ratio: Float[Tensor, " N"] | None = None,
) -> Float[Tensor, " N"]:
    """Return w = π/μ, differentiable in log π.

    Args:
        log_prob: log π of the sampled tokens.
        behaviour_log_probs: log μ of the same tokens; None on policy: the ratio is 1, its gradient ∇ log π.
        sequence_log_ratio: mean_t log w_t of each token's response, for one ratio a response: its value is
            exp of that, its gradient that times ∇ log π.

    >>> ratio(torch.tensor([-1.0]), torch.tensor([-1.0])).item()
    1.0
    """
    if sequence_log_ratio is not None:
        return sequence_log_ratio.detach().exp() * (log_prob - log_prob.detach()).exp()
    behaviour = log_prob.detach() if behaviour_log_probs is None else behaviour_log_probs.detach()
    return (log_prob - behaviour).exp()


def surrogate(
    region: TrustRegion,
    w: Float[Tensor, " N"],
    log_prob: Float[Tensor, " N"],
    advantages: Float[Tensor, " N"],
) -> Float[Tensor, " N"]:
    """Return the per-token surrogate that is to be maximised (see `TrustRegion` for the formulas).

    Args:
        region: The trust region.
        w: The ratio, as `ratio` returns it.
        log_prob: log π of the sampled tokens.
        advantages: Advantage of each token.

    >>> w, log_prob, advantages = torch.tensor([1.5]), torch.tensor([-1.0]), torch.tensor([2.0])
    >>> round(surrogate(TrustRegion("clip"), w, log_prob, advantages).item(), 6)
    2.4
    """
    if region.kind == "none":
        return w * advantages
    clipped = w.clamp(1 - region.low, 1 + region.high)
    if region.kind == "cispo":
        return clipped.detach() * advantages * log_prob
    least = torch.minimum(w * advantages, clipped * advantages)
    if region.dual is None:
        return least
    return torch.where(advantages < 0, torch.maximum(least, region.dual * advantages), least)


def clip_masks(
    region: TrustRegion, w: Float[Tensor, " N"], advantages: Float[Tensor, " N"]
) -> tuple[Bool[Tensor, " N"], Bool[Tensor, " N"]]:
    """Return the tokens on which the lower and on which the upper bound acts.

    In ``clip`` and ``sequence`` a bound acts where it takes the gradient away: the lower one where A < 0 and
    w < 1 − low, the upper one where A > 0 and w > 1 + high, or where dual clip acts (A < 0 and w > dual).
    In ``cispo`` it acts where the ratio is cut, whatever the sign of A.

    >>> low, high = clip_masks(TrustRegion("clip"), torch.tensor([0.5, 1.5]), torch.tensor([-1.0, -1.0]))
    >>> low.tolist(), high.tolist()
    ([True, False], [False, False])
    """
    below, above = w < 1 - region.low, w > 1 + region.high
    if region.kind == "none":
        return torch.zeros_like(below), torch.zeros_like(above)
    if region.kind == "cispo":
        return below, above
    high = above & (advantages > 0)
    if region.dual is not None:
        high = high | ((advantages < 0) & (w > region.dual))
    return below & (advantages < 0), high
