"""Held-out evaluation of a policy: rewards with their standard error, exact KL, samples kept token by token."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kedge.rewards import RewardSet
from kedge.rollout import SamplingConfig, generate
from kedge.runs.seeds import generator
from kedge.statistics import clustered_standard_error
from kedge.training.collect import Batch, describe, reward
from kedge.training.config import EvaluationConfig
from kedge.training.loop import Evaluation
from kedge.training.measures import (
    FORWARD,
    MEASURED,
    length_metrics,
    policy_metrics,
    reward_metrics,
)
from kedge.training.prompts import Prompts
from kedge.training.scoring import Scorer, arithmetic


@dataclass(frozen=True)
class PolicyEvaluator:
    """Answers the same held-out prompts with the same random draws each time."""

    config: EvaluationConfig
    model: PreTrainedModel
    reference: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    prompts: Prompts
    rewards: RewardSet
    sampling: SamplingConfig
    scorer: Scorer
    seed: int
    log: Callable[[str], None]

    def evaluate(self, step: int) -> Evaluation:
        """Sample, reward and score; the score of a model is its mean reward."""
        rows = list(range(len(self.prompts)))
        draw = generator(self.seed, "evaluation", device=self.model.device)
        tokens = [self.prompts.tokens[row] for row in rows]
        with arithmetic(self.model, self.scorer.compute.precision):
            rollout = generate(
                self.model,
                self.tokenizer,
                tokens,
                self.sampling,
                draw,
                batch_size=max(1, self.scorer.compute.micro_batch // self.sampling.responses_per_prompt),
            )
        batch = reward(Batch(rollout, rows), self.prompts, self.rewards, self.tokenizer, self.log)
        scores = self._scores(batch)
        metrics = {
            **reward_metrics(batch.rewards),
            **policy_metrics(scores, rollout),
            **length_metrics(rollout),
            "temperature": self.config.temperature,
        }
        for name, values in batch.rewards.items():
            key = "mean" if name == "total" else name
            metrics[f"reward/{key}_se"] = clustered_standard_error(values, rollout.group)
        mean = metrics["reward/mean"]
        return Evaluation(metrics, -math.inf if math.isnan(mean) else mean, self._samples(batch, scores))

    def _scores(self, batch: Batch) -> dict[str, Tensor]:
        rollout = batch.rollout
        anchors = {
            "reference": (
                self.scorer.hidden_in_parts(self.reference, rollout),
                self.scorer.head(self.reference),
            )
        }
        want = MEASURED | {FORWARD}
        hidden = self.scorer.hidden_in_parts(self.model, rollout)
        return self.scorer.scores(hidden, self.scorer.head(self.model), rollout, anchors, want)

    def _samples(self, batch: Batch, scores: dict[str, Tensor]) -> list[dict[str, Any]]:
        """Responses to the first few prompts, with the KL of every token."""
        kept = torch.nonzero(batch.rollout.group < self.config.samples).flatten()
        rollout = batch.rollout.select(kept)
        if len(kept) == 0:
            return []
        rewards = {name: values[kept] for name, values in batch.rewards.items()}
        answered = [batch.response_rows[index] for index in kept.tolist()]
        rows = describe(rollout, answered, rewards, self.prompts, self.tokenizer)
        ends = [0, *batch.rollout.response_lengths.cumsum(0).tolist()]
        kl = scores["reference.reverse_kl"].tolist()
        return [{**row, "kl": kl[ends[i] : ends[i + 1]]} for row, i in zip(rows, kept.tolist(), strict=True)]
