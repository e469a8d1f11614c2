"""The losses, written once for every contender that lets the loss be written."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from benchmarks.head.inputs import Inputs

CLIP, BETA, ENTROPY_BONUS = 0.2, 0.04, 0.001

EXACT = "exact KL + entropy"
SAMPLED = "sampled k3"
CACHED = "sampled k3, log ρ(a) cached"
CROSS_ENTROPY = "cross-entropy"
TASKS = (EXACT, SAMPLED, CACHED, CROSS_ENTROPY)
PRODUCTS = {EXACT: 4, SAMPLED: 4, CACHED: 3, CROSS_ENTROPY: 3}
"""How many matrix products of 2·N·H·V operations a task cannot do without."""

WANT = {
    EXACT: {"log_prob", "entropy", "reference.reverse_kl"},
    SAMPLED: {"log_prob", "reference.log_prob"},
    CACHED: {"log_prob"},
    CROSS_ENTROPY: {"log_prob"},
}


def loss_of(task: str, scores: Mapping[str, Tensor], inputs: Inputs, rows: slice) -> Tensor:
    """Return the mean over all tokens of the loss, of some rows' share in it."""
    log_prob = scores["log_prob"]
    if task == CROSS_ENTROPY:
        return -log_prob.sum() / inputs.size.rows
    ratio = (log_prob - inputs.old_log_prob[rows]).exp()
    advantages = inputs.token_advantages[rows]
    loss = -torch.minimum(ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages)
    if task == EXACT:
        loss = loss + BETA * scores["reference.reverse_kl"] - ENTROPY_BONUS * scores["entropy"]
    else:
        reference = inputs.reference_log_prob[rows] if task == CACHED else scores["reference.log_prob"]
        log_ratio = reference - log_prob
        loss = loss + BETA * (log_ratio.exp() - 1 - log_ratio)
    return loss.sum() / inputs.size.rows
