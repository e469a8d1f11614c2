"""From prompts to experience: responses, rewards, advantages, and what the old policy and the reference say."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from kedge.objective import (
    PolicyLoss,
    anchor_rewards,
    correction_weights,
    group_advantages,
)
from kedge.rollout import Rollout
from kedge.training.collect import Batch, Collector
from kedge.training.config import GrpoStage
from kedge.training.experience import Experience
from kedge.training.measures import MEASURED, length_metrics, policy_metrics, reward_metrics
from kedge.training.scoring import Scorer

Metrics = dict[str, float]


@dataclass(frozen=True)
class Gatherer:
    """Makes the experience of a step."""

    stage: GrpoStage
    model: PreTrainedModel
    reference: PreTrainedModel
    scorer: Scorer
    collector: Collector

    def gather(self, step: int, loss: PolicyLoss) -> tuple[Experience, Metrics]:
        """Roll out, score and reward; ``loss`` says which statistics the first update needs."""
        batch, metrics = self.collector.collect(step)
        started = time.perf_counter()
        rollout = batch.rollout
        reference_hidden = self.scorer.hidden_in_parts(self.reference, rollout)
        old, old_hidden = self._old_pass(rollout, reference_hidden, loss)
        metrics |= {**reward_metrics(batch.rewards), **length_metrics(rollout)}
        if old is not None:
            metrics |= policy_metrics(old, rollout)
        old_log_probs = old["log_prob"] if old is not None else None
        correction = None
        if self.stage.correction.kind != "none" and old_log_probs is not None:
            correction = correction_weights(
                old_log_probs,
                rollout.sampler_log_probs,
                rollout.response_lengths,
                self.stage.correction.build(),
            )
            metrics["correction/weight_mean"] = float(correction.mean())
        advantages = self._advantages(batch, old, loss)
        metrics["advantage/zero_fraction"] = float((advantages == 0).double().mean())
        metrics["seconds/score"] = time.perf_counter() - started
        experience = Experience(
            rollout=rollout,
            rows=torch.tensor(batch.response_rows, device=rollout.group.device),
            rewards=batch.rewards,
            advantages=advantages.repeat_interleave(rollout.response_lengths),
            learn=self._learn(batch),
            reference_hidden=reference_hidden,
            old_log_probs=old_log_probs,
            old_hidden=old_hidden,
            correction=correction,
            statistics={name: old[name] for name in loss.statistics()} if old is not None else None,
        )
        return experience, metrics

    def needs_old_pass(self, loss: PolicyLoss) -> bool:
        """Whether the old policy's log-probabilities must be known before the first update.

        With one update a step and nothing that needs them beforehand, the update's own pass is the old policy.
        """
        return (
            self.stage.updates_per_step > 1
            or self.stage.correction.kind != "none"
            or self.stage.anchor.placement == "reward"
            or bool(loss.statistics())
        )

    def _old_pass(
        self, rollout: Rollout, reference_hidden: Float[Tensor, "N K"], loss: PolicyLoss
    ) -> tuple[dict[str, Float[Tensor, " N"]] | None, Float[Tensor, "N H"] | None]:
        if not self.needs_old_pass(loss):
            return None, None
        hidden = self.scorer.hidden_in_parts(self.model, rollout)
        scores = self.scorer.scores(
            hidden,
            self.scorer.head(self.model),
            rollout,
            {"reference": (reference_hidden, self.scorer.head(self.reference))},
            MEASURED | loss.statistics(),
        )
        return scores, hidden if self.stage.old_kl_limit is not None else None

    def _advantages(
        self, batch: Batch, old: dict[str, Tensor] | None, loss: PolicyLoss
    ) -> Float[Tensor, " R"]:
        total = batch.rewards["total"].clone()
        rollout = batch.rollout
        if self.stage.rollout.truncation_penalty is not None:
            total = total - self.stage.rollout.truncation_penalty * (~rollout.finished)
        if loss.anchor.placement == "reward" and loss.anchor.gradient == "published" and old is not None:
            total = total + anchor_rewards(
                loss.anchor, loss.beta, old, rollout.mask, rollout.response_lengths
            )
        return group_advantages(
            total.to(torch.float32), rollout.group, self.stage.advantage.kind, std=self.stage.advantage.std
        )

    def _learn(self, batch: Batch) -> Tensor:
        """Responses that take part in the policy loss."""
        learn = ~batch.rewards["total"].isnan()
        if self.stage.rollout.truncated == "mask":
            learn = learn & batch.rollout.finished
        return learn
