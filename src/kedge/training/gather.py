"""From prompts to experience: responses, rewards, advantages, and what the old policy and the reference say."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from kedge.objective import PolicyLoss, correction_weights
from kedge.rollout import Rollout
from kedge.training.collect import Collector, learnt_from, worth_of
from kedge.training.config import GrpoStage, PpoStage
from kedge.training.credit import Credit, Rewarded, critic_credit, group_credit
from kedge.training.critic import CriticWork
from kedge.training.experience import Experience
from kedge.training.measures import FORWARD, MEASURED, length_metrics, policy_metrics, reward_metrics
from kedge.training.scoring import Scorer

Metrics = dict[str, float]


@dataclass(frozen=True)
class Gatherer:
    """Makes the experience of a step."""

    stage: GrpoStage | PpoStage
    model: PreTrainedModel
    reference: PreTrainedModel
    scorer: Scorer
    collector: Collector
    critic: CriticWork | None = None

    def gather(self, step: int, loss: PolicyLoss) -> tuple[Experience, Metrics]:
        """Roll out, score and reward; ``loss`` says which statistics the first update needs."""
        batch, metrics = self.collector.collect(step)
        started = time.perf_counter()
        rollout = batch.rollout
        reference_hidden = self.scorer.hidden_in_parts(self.reference, rollout)
        old, hidden = self._old_pass(rollout, reference_hidden, loss)
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
        worth, learn = worth_of(batch, self.stage.rollout), learnt_from(batch, self.stage.rollout)
        credit = self._credit(Rewarded(rollout, worth, learn, old, loss), hidden)
        metrics |= credit.metrics
        metrics["seconds/score"] = time.perf_counter() - started
        experience = Experience(
            rollout=rollout,
            rows=torch.tensor(batch.response_rows, device=rollout.group.device),
            rewards=batch.rewards,
            advantages=credit.advantages,
            learn=learn,
            reference_hidden=reference_hidden,
            old_log_probs=old_log_probs,
            old_hidden=hidden if self.stage.measures_old else None,
            correction=correction,
            values=credit.values,
            returns=credit.returns,
            statistics=_first_statistics(loss, old) if old is not None else None,
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
            or self.stage.measures_old
            or (self.critic is not None and self.critic.shared)
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
            MEASURED | _of_policy(loss.statistics()) | (loss.want() & {FORWARD}),
        )
        return scores, hidden

    def _credit(self, given: Rewarded, hidden: Float[Tensor, "N H"] | None) -> Credit:
        """The one place where GRPO and PPO part before the updates."""
        if isinstance(self.stage, GrpoStage):
            return group_credit(self.stage.advantage, given)
        assert self.critic is not None  # a PPO stage has one
        return critic_credit(self.stage.advantage, given, self.critic.values(given.rollout, hidden))


def _of_policy(outputs: frozenset[str]) -> frozenset[str]:
    """Leave out what compares with the old policy."""
    return frozenset(name for name in outputs if not name.startswith("old."))


def _first_statistics(loss: PolicyLoss, old: dict[str, Tensor]) -> dict[str, Tensor]:
    """Statistics of the policy before the first update, when every divergence from the old one is 0."""
    outputs = loss.statistics()
    here = _of_policy(outputs)
    return {name: old[name] if name in here else torch.zeros_like(old["log_prob"]) for name in outputs}
