"""The figures that a batch of scored responses is summed up by; one place for every metric's definition."""

from __future__ import annotations

import math
from collections.abc import Mapping

from jaxtyping import Float
from torch import Tensor

from kedge.divergence import k1, k2, k3
from kedge.objective import masked_mean
from kedge.rollout import Rollout

MEASURED = frozenset({"log_prob", "entropy", "reference.log_prob", "reference.reverse_kl"})
"""Head outputs that ``policy_metrics`` needs; with ``reference.forward_kl`` the other direction is measured too."""


def policy_metrics(scores: Mapping[str, Tensor], rollout: Rollout) -> dict[str, float]:
    """Divergence, entropy and perplexity over all response tokens of a batch.

    Per token: the sum over the batch's response tokens divided by their number; ``_per_response``: divided by
    the number of responses. Nats. Responses are samples of the policy, so KL(policy‖reference) summed along
    them is unbiased for the sequence KL.
    """
    mask = rollout.mask
    log_prob, reference = scores["log_prob"], scores["reference.log_prob"]
    exact = scores["reference.reverse_kl"]

    def mean(values: Tensor) -> float:
        return float(masked_mean(values, mask))

    metrics = {
        "kl/policy_reference/exact": mean(exact),
        "kl/policy_reference/exact_per_response": float((exact * mask).sum()) / max(1, len(rollout.group)),
        "kl/policy_reference/k1": mean(k1(log_prob, reference)),
        "kl/policy_reference/k2": mean(k2(log_prob, reference)),
        "kl/policy_reference/k3": mean(k3(log_prob, reference)),
        "entropy/policy": mean(scores["entropy"]),
        "perplexity/reference": perplexity(-mean(reference)),
        "perplexity/policy": perplexity(-mean(log_prob)),
    }
    if "reference.forward_kl" in scores:
        metrics["kl/reference_policy/exact"] = mean(scores["reference.forward_kl"])
    return metrics


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
