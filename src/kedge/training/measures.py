"""The figures that a batch of scored responses is summed up by; one place for every metric's definition."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from kedge.divergence import k1, k2, k3
from kedge.objective import bradley_terry_loss, brier_score, expected_calibration_error, masked_mean
from kedge.rollout import Rollout

MEASURED = frozenset({"log_prob", "entropy", "reference.log_prob", "reference.reverse_kl"})
"""Head outputs that ``policy_metrics`` needs; with ``FORWARD`` the other direction is measured too."""
FORWARD = "reference.forward_kl"


def policy_metrics(scores: Mapping[str, Tensor], rollout: Rollout) -> dict[str, float]:
    """Divergence, entropy and perplexity over all response tokens of a batch.

    Per token: the sum over the batch's response tokens divided by their number; ``_per_response``: divided by
    the number of responses. Nats. Responses are samples of the policy, so KL(policy‖reference) summed along
    them is unbiased for the sequence KL.
    """
    mask = rollout.mask
    log_prob, reference = scores["log_prob"], scores["reference.log_prob"]

    def mean(values: Tensor) -> float:
        return float(masked_mean(values, mask))

    def exact(pair: str, values: Tensor) -> dict[str, float]:
        per_response = float((values * mask).sum()) / max(1, len(rollout.group))
        return {f"kl/{pair}/exact": mean(values), f"kl/{pair}/exact_per_response": per_response}

    metrics = {
        **exact("policy_reference", scores["reference.reverse_kl"]),
        "kl/policy_reference/k1": mean(k1(log_prob, reference)),
        "kl/policy_reference/k2": mean(k2(log_prob, reference)),
        "kl/policy_reference/k3": mean(k3(log_prob, reference)),
        "entropy/policy": mean(scores["entropy"]),
        "perplexity/reference": perplexity(-mean(reference)),
        "perplexity/policy": perplexity(-mean(log_prob)),
    }
    return metrics | (exact("reference_policy", scores[FORWARD]) if FORWARD in scores else {})


def length_metrics(rollout: Rollout) -> dict[str, float]:
    """Lengths in tokens, and the share of responses that the length limit cut."""
    lengths = rollout.response_lengths.double()
    return {
        "length/mean": float(lengths.mean()),
        "length/median": float(lengths.median()),
        "length/max": float(lengths.max()),
        "length/truncated_fraction": float((~rollout.finished).double().mean()),
    }


def reward_metrics(rewards: Mapping[str, Float[Tensor, " R"]]) -> dict[str, float]:
    """Mean and spread of the total, mean of each reward; unscorable responses are left out and counted."""
    total = rewards["total"]
    scored = total[~total.isnan()].double()
    metrics = {
        "reward/mean": float(scored.mean()) if len(scored) else math.nan,
        "reward/std": float(scored.std()) if len(scored) > 1 else math.nan,
        "reward/unscorable_fraction": float(total.isnan().double().mean()),
    }
    for name, values in rewards.items():
        if name != "total":
            metrics[f"reward/{name}"] = float(values.double().nanmean())
    return metrics


def perplexity(cross_entropy: float) -> float:
    """Exp of a cross-entropy in nats; infinite where float64 would overflow."""
    return math.exp(cross_entropy) if cross_entropy < 700 else math.inf


def preference_metrics(chosen: Float[Tensor, " P"], rejected: Float[Tensor, " P"]) -> dict[str, float]:
    """How a reward model judges pairs, Δ being r(chosen) − r(rejected) and σ(Δ) the probability it gives the choice.

    Margins of the data take no part: they shape the loss, not what was preferred.
    """
    difference = (chosen - rejected).double()
    probability = torch.sigmoid(difference)
    scores = torch.cat([chosen, rejected]).double()
    return {
        "preference/accuracy": _share_right(difference),
        "preference/cross_entropy": float(bradley_terry_loss(chosen.double(), rejected.double()).mean()),
        "preference/brier_score": brier_score(probability),
        "preference/calibration_error": expected_calibration_error(probability),
        "preference/margin_mean": float(difference.mean()),
        "preference/score_mean": float(scores.mean()),
        "preference/score_std": float(scores.std()),
    }


def bayes_metrics(true_preference: Float[Tensor, " P"]) -> dict[str, float]:
    """What a model that knows the judge would reach on the same pairs: no other is right more often."""
    logit = torch.logit(true_preference.double())
    return {
        "preference/accuracy_bayes": _share_right(logit),
        "preference/cross_entropy_bayes": float(bradley_terry_loss(logit, torch.zeros_like(logit)).mean()),
    }


def _share_right(difference: Float[Tensor, " P"]) -> float:
    """Share of pairs in the right order; a tie is half right."""
    return float(torch.where(difference == 0, 0.5, (difference > 0).double()).mean())
