"""How the KL between policy and reference enters the objective: measure × placement × gradient."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kedge.divergence import ESTIMATORS, token_surrogate
from kedge.objective.advantages import position_baseline, reward_to_go
from kedge.objective.aggregate import pad, per_response_sum, valid_positions


@dataclass(frozen=True)
class Anchor:
    """One way of holding the policy π to the reference ρ. L = log π(a) − log ρ(a); sg = stopped gradient.

    In the ``loss``, per token (to be minimised, times β)::

        exact  published, token  KL_t, differentiated: ∇KL_t, right per state
               sequence          KL_t + log π·sg[Σ_{u>t} KL_u]: right for the whole response
        k1 k2 k3  published      the estimator, differentiated as it stands
                  token          value of the estimator, gradient w·L·∇log π: right per state
        k1     sequence          log π·sg[Σ_{u≥t} L_u]: right for the whole response

    In the ``reward``, nothing is differentiated::

        published  −β k_t joins the token's reward; over a group −β Σ_t k_t the response's, before it is normalised
        token      −β L_t joins the token's advantage, after the normalisation
        sequence   −β Σ_{u≥t} L_u joins the token's advantage, after the normalisation

    Off policy, ``sequence`` in the loss is exact with ``weights="prefix"``: W_{<t}·KL_t and W_{<u}·KL_u, or
    W_{≤u}·L_u, W being the running product of π/μ.

    Args:
        measure: The exact KL over the vocabulary, or an estimator from the sampled tokens.
        direction: ``reverse`` is KL(π‖ρ), ``forward`` KL(ρ‖π).
        placement: Where it acts.
        gradient: As the papers differentiate it, right per state, or right for the whole response.
        weights: Importance weights for the ``sequence`` gradient in the loss.
        baseline: For ``sequence``: subtract the group's mean to-go at the position (`position_baseline`).

    Not every combination means something: `refusal` says why, and a configuration should ask it.

    >>> refusal(Anchor("exact", gradient="sequence")) is None
    True
    """

    measure: Literal["exact", "k1", "k2", "k3"] = "exact"
    direction: Literal["reverse", "forward"] = "reverse"
    placement: Literal["loss", "reward"] = "loss"
    gradient: Literal["published", "token", "sequence"] = "token"
    weights: Literal["none", "prefix"] = "none"
    baseline: bool = False

    @property
    def exact(self) -> bool:
        """Whether the measure sums over the whole vocabulary."""
        return self.measure == "exact"

    @property
    def outputs(self) -> frozenset[str]:
        """Outputs of the head that the measure's value needs, besides ``log_prob``."""
        return frozenset({f"reference.{self.direction}_kl" if self.exact else "reference.log_prob"})


def undefined(anchor: Anchor) -> str | None:
    """Say why no formula belongs to this combination; None if one does.

    >>> undefined(Anchor("k3", direction="forward"))
    'forward KL is KL(reference‖policy): k3 would need tokens drawn from the reference; use measure exact'
    """
    if anchor.direction == "forward" and not anchor.exact:
        return (
            f"forward KL is KL(reference‖policy): {anchor.measure} would need tokens drawn from the "
            "reference; use measure exact"
        )
    if anchor.gradient != "sequence" and (anchor.weights != "none" or anchor.baseline):
        return f"weights and baseline act on gradient sequence only, and do nothing with {anchor.gradient}"
    if anchor.weights == "prefix" and anchor.placement == "reward":
        return "prefix weights act in the loss only: in the reward the trust region's ratio weighs each token"
    return None


def refusal(anchor: Anchor) -> str | None:
    """Say why this combination means nothing, with the remedy; None if it is fine.

    >>> refusal(Anchor("k1", gradient="published"))
    'k1 as a loss has an expected gradient of zero: no anchor at all; use gradient token'
    """
    if reason := undefined(anchor):
        return reason
    if anchor.placement == "reward" and anchor.exact:
        return (
            "exact KL in the reward drops its own gradient, since KL_t does not depend on the token drawn: "
            "use placement loss with gradient sequence"
        )
    if anchor.direction == "forward" and anchor.gradient == "sequence":
        return (
            "forward KL over whole responses is an expectation under the reference, which drew none of them; "
            "use gradient token"
        )
    if anchor.measure in ("k2", "k3") and anchor.gradient == "sequence":
        return f"{anchor.measure} has no right gradient over whole responses; use measure exact or k1"
    if anchor.measure in ("k2", "k3") and anchor.placement == "reward" and anchor.gradient == "token":
        return f"{anchor.measure} in the reward is not right per state; use measure k1, or gradient published"
    if anchor.measure == "k1" and anchor.placement == "loss" and anchor.gradient == "published":
        return "k1 as a loss has an expected gradient of zero: no anchor at all; use gradient token"
    return None


def caution(anchor: Anchor, *, rescaled: bool = True) -> str | None:
    """Describe in one line what a known bias of the field's practice does; None if there is none.

    Args:
        anchor: The anchor.
        rescaled: Whether rewards are divided by their standard deviation once the anchor has joined them, as in
            advantages ``group`` and ``batch``.

    >>> caution(Anchor("k3", gradient="published"))[:52]
    'k3 as a loss has the gradient of KL(reference‖policy'
    """
    if anchor.gradient != "published":
        return None
    if anchor.placement == "loss":
        if anchor.measure != "k3":
            return None
        return (
            "k3 as a loss has the gradient of KL(reference‖policy) under the value of KL(policy‖reference); "
            "gradient token is right per state"
        )
    if anchor.measure == "k2":
        return "k2 in the reward has the gradient of E[L²]/2 − KL(policy‖reference), not of the KL; use k1"
    if anchor.measure == "k3":
        return (
            "k3 in the reward has the gradient of KL(policy‖reference) − KL(reference‖policy), which "
            "vanishes to first order: almost no anchor; k1 is right"
        )
    if not rescaled:
        return None
    return (
        "the group's standard deviation divides the reward and the KL in it alike: β stays in reward per nat, but how "
        "hard both pull changes from group to group"
    )


def anchor_values(anchor: Anchor, scores: Mapping[str, Tensor]) -> Float[Tensor, " N"]:
    """Return the measure's value at each token, differentiable as published.

    Args:
        anchor: Which measure.
        scores: ``log_prob`` and `Anchor.outputs`, as the head gives them.

    Returns:
        KL_t over the vocabulary, or the estimator at the sampled token; nats per token.

    >>> scores = {"log_prob": torch.tensor([-1.0]), "reference.log_prob": torch.tensor([-3.0])}
    >>> anchor_values(Anchor("k2"), scores).tolist()
    [2.0]
    """
    if anchor.exact:
        return scores[f"reference.{anchor.direction}_kl"]
    return ESTIMATORS[anchor.measure](scores["log_prob"], scores["reference.log_prob"])


def anchor_token_rewards(
    anchor: Anchor, beta: float, scores: Mapping[str, Tensor], mask: Bool[Tensor, " N"]
) -> Float[Tensor, " N"]:
    """Return what the anchor adds to each token's reward: −β·k_t, RLHF's form.

    To the rewards of whole responses on their last tokens (`terminal_rewards`) this adds up to what `gae` takes;
    there the critic learns both together.

    Args:
        anchor: Placement ``reward``, gradient ``published``.
        beta: β, in reward per nat.
        scores: ``log_prob`` and `Anchor.outputs` of the policy that drew the tokens.
        mask: Tokens that count; the others get 0.

    Returns:
        One amount a token, detached.

    Raises:
        ValueError: Another placement or gradient: it acts elsewhere.

    Source: Ziegler et al. 2019, arXiv 1909.08593, section 2.1; Ouyang et al. 2022, arXiv 2203.02155.

    >>> scores = {"log_prob": torch.tensor([-1.0, -2.0]), "reference.log_prob": torch.tensor([-3.0, -2.5])}
    >>> anchor = Anchor("k1", placement="reward", gradient="published")
    >>> anchor_token_rewards(anchor, 0.5, scores, torch.tensor([True, True])).tolist()
    [-1.0, -0.25]
    """
    if anchor.placement != "reward" or anchor.gradient != "published":
        raise ValueError(f"only placement reward with gradient published joins the reward, got {anchor}")
    return -beta * torch.where(mask, anchor_values(anchor, scores).detach(), 0.0)


def anchor_rewards(
    anchor: Anchor,
    beta: float,
    scores: Mapping[str, Tensor],
    mask: Bool[Tensor, " N"],
    lengths: Int[Tensor, " R"],
) -> Float[Tensor, " R"]:
    """Return what the classic fused form adds to each response's reward: −β Σ_t k_t.

    The group's normalisation that follows divides it, with the reward, by the standard deviation of both together.
    β stays in reward per nat: where r − β Σ_t L_t is the same for all responses nothing pulls any more, and that is
    the optimum. Gradient ``sequence`` in the reward is added after it: there β is in standard deviations per nat.

    Args:
        anchor: Placement ``reward``, gradient ``published``.
        beta: β, in reward per nat.
        scores: As for `anchor_token_rewards`, whose sum over each response this is.
        mask: Tokens that count.
        lengths: Tokens of each response.

    Returns:
        One amount a response, to be added to its reward; detached.

    Raises:
        ValueError: Another placement or gradient: it acts elsewhere.

    Source: Ziegler et al. 2019, arXiv 1909.08593, section 2.1.

    >>> scores = {"log_prob": torch.tensor([-1.0, -2.0]), "reference.log_prob": torch.tensor([-3.0, -2.5])}
    >>> anchor = Anchor("k1", placement="reward", gradient="published")
    >>> anchor_rewards(anchor, 0.5, scores, torch.tensor([True, True]), torch.tensor([2])).tolist()
    [-1.25]
    """
    return per_response_sum(anchor_token_rewards(anchor, beta, scores, mask), lengths)


def anchor_to_go(
    anchor: Anchor,
    values: Float[Tensor, " N"],
    log_ratio: Float[Tensor, " N"],
    mask: Bool[Tensor, " N"],
    lengths: Int[Tensor, " R"],
    group: Int[Tensor, " R"],
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
    """Return the weight of each token's own value, and the weighted to-go that multiplies its score.

    With W_{≤t} = Π_{u≤t} π/μ for ``weights="prefix"`` and 1 otherwise::

        exact in the loss   W_{<t}   Σ_{u>t} W_{<u} KL_u
        all others          W_{≤t}   Σ_{u≥t} W_{≤u} k_u

    A baseline b_t (`position_baseline` of the to-go) is subtracted as W_{≤t}·b_t.

    Args:
        anchor: Gradient ``sequence``.
        values: `anchor_values` of whole responses.
        log_ratio: log π − log μ; not used without weights.
        mask: Tokens the policy drew; the others have no KL and ratio 1.
        lengths: Tokens of each response.
        group: Prompt of each response.

    >>> values, nothing, mask = torch.tensor([1.0, 2.0]), torch.zeros(2), torch.ones(2, dtype=torch.bool)
    >>> anchor = Anchor("exact", gradient="sequence")
    >>> weights, to_go = anchor_to_go(anchor, values, nothing, mask, torch.tensor([2]), torch.tensor([0]))
    >>> to_go.tolist()
    [2.0, 0.0]
    """
    own_term = anchor.exact and anchor.placement == "loss"
    including = torch.ones_like(values)
    before = including
    if anchor.weights == "prefix":
        log_ratio = torch.where(mask, log_ratio.detach(), 0.0)
        valid = valid_positions(lengths, values.numel())
        running = pad(log_ratio, valid).cumsum(dim=1)[valid]
        including, before = running.exp(), (running - log_ratio).exp()
    weights = before if own_term else including
    weighted = torch.where(mask, weights * values.detach(), 0.0)
    to_go = reward_to_go(weighted, lengths, inclusive=not own_term)
    if anchor.baseline:
        to_go = to_go - including * position_baseline(to_go, lengths, group)
    return weights, to_go


def anchor_term(
    anchor: Anchor,
    scores: Mapping[str, Tensor],
    behaviour_log_probs: Float[Tensor, " N"] | None = None,
    prefix_weights: Float[Tensor, " N"] | None = None,
    to_go: Float[Tensor, " N"] | None = None,
) -> Float[Tensor, " N"]:
    """Return the anchor's per-token term of the loss; its value is the measure's, its gradient as asked for.

    Args:
        anchor: Placement ``loss``.
        scores: ``log_prob`` and `Anchor.outputs`.
        behaviour_log_probs: log μ, for the token weight w of gradient ``token``; None on policy.
        prefix_weights: Weight of the token's own value, for gradient ``sequence``.
        to_go: What multiplies the token's score, for gradient ``sequence``; both from `anchor_to_go`.

    >>> scores = {"log_prob": torch.tensor([-1.0]), "reference.log_prob": torch.tensor([-3.0])}
    >>> anchor_term(Anchor("k1", gradient="token"), scores).tolist()
    [2.0]
    """
    log_prob = scores["log_prob"]
    if anchor.gradient == "token" and not anchor.exact:
        return token_surrogate(anchor.measure, log_prob, scores["reference.log_prob"], behaviour_log_probs)
    values = anchor_values(anchor, scores)
    if anchor.gradient != "sequence":
        return values
    if prefix_weights is None or to_go is None:
        raise ValueError("gradient sequence needs the statistics of whole responses: call prepare first")
    own = values if anchor.exact else values.detach()
    return prefix_weights * own + to_go * (log_prob - log_prob.detach())
