"""What must hold before the first update, checked by separate passes of different batch shapes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from kedge.rollout import Rollout
from kedge.training.loop import Metrics, Session
from kedge.training.measures import MEASURED
from kedge.training.scoring import Scorer

RESPONSES = 32


@dataclass(frozen=True)
class Tolerance:
    """Largest figures that rounding explains."""

    kl: float
    """KL(policy‖reference) of equal weights, nats per token."""
    log_ratio: float
    """|log π − log π| between two passes, and between sampler and trainer, nats."""


TOLERANCES = {
    torch.float64: Tolerance(kl=1e-12, log_ratio=1e-8),
    torch.float32: Tolerance(kl=1e-6, log_ratio=1e-3),
    torch.bfloat16: Tolerance(kl=1e-2, log_ratio=0.5),
}


def start_of_run(session: Session, reference: PreTrainedModel, scorer: Scorer, rollout: Rollout) -> Metrics:
    """Check KL(policy‖reference) at step 0, the ratio at the first update, and sampler against trainer.

    Every figure is a metric of the first step. One that rounding does not explain is a warning on screen and
    in the log, with what to look for. The KL is checked where the reference has the policy's weights.
    """
    some = rollout.select(torch.arange(min(RESPONSES, len(rollout.group)), device=rollout.group.device))
    model = session.model
    count = min(len(some.group), scorer.compute.micro_batch)  # as many at once as the updates will take
    anchors = {
        "reference": (scorer.hidden_in_parts(reference, some, max(1, count // 3)), scorer.head(reference))
    }
    here = scorer.scores(
        scorer.hidden_in_parts(model, some, count), scorer.head(model), some, anchors, MEASURED
    )
    again = scorer.scores(scorer.hidden_in_parts(model, some, 1), scorer.head(model), some, {}, {"log_prob"})
    metrics = {
        "check/kl_policy_reference": float(here["reference.reverse_kl"].mean()),
        "check/log_ratio_max": float((here["log_prob"] - again["log_prob"]).abs().max()),
        "check/sampler_log_prob_error_max": float((here["log_prob"] - some.sampler_log_probs).abs().max()),
    }
    low = scorer.compute.precision == "bfloat16"
    tolerance = TOLERANCES[torch.bfloat16 if low else model.dtype]
    same = session.identity["policy at the start"] == session.identity["reference"]
    for warning in _warnings(metrics, tolerance, same):
        session.progress.say(f"warning: {warning}")
        session.run.log(f"warning: {warning}")
    return metrics


def _warnings(metrics: Metrics, tolerance: Tolerance, same: bool) -> list[str]:
    found = []
    kl = metrics["check/kl_policy_reference"]
    if same and not kl <= tolerance.kl:
        found.append(
            f"policy and reference have the same weights but KL(policy‖reference) is {kl:.3g} nats/token at step 0 "
            f"(tolerance {tolerance.kl:g}): is something random (dropout) or batch-dependent in the model?"
        )
    ratio = metrics["check/log_ratio_max"]
    if not ratio <= tolerance.log_ratio:
        found.append(
            f"two passes of the same policy over the same tokens differ by up to {ratio:.3g} nats (tolerance "
            f"{tolerance.log_ratio:g}): the ratio at the first update is not 1; the batch's shape changes the model"
        )
    sampler = metrics["check/sampler_log_prob_error_max"]
    if not sampler <= tolerance.log_ratio:
        found.append(
            f"the sampler's log-probabilities differ from the trainer's by up to {sampler:.3g} nats (tolerance "
            f"{tolerance.log_ratio:g}); correction: {{kind: truncate}} weighs the mismatch"
        )
    return found
