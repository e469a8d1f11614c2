"""Supervised fine-tuning: cross-entropy on the data, with entropy, perplexity and, where known, H(data) and KL."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kedge.data import Order
from kedge.head import reduce, score
from kedge.models import hidden_states
from kedge.training.checkpoint import Moment
from kedge.training.config import SftStage
from kedge.training.examples import ExampleBatch, Examples
from kedge.training.loop import Evaluation, Metrics, Session
from kedge.training.measures import perplexity
from kedge.training.scoring import Scorer, arithmetic

SCORED = frozenset({"log_prob", "entropy"})


@dataclass
class SftWork:
    """The steps of supervised fine-tuning; the position in the data is all that is carried on."""

    session: Session
    stage: SftStage
    train: Examples
    heldout: Examples | None
    scorer: Scorer
    order: Order = field(init=False)

    def __post_init__(self) -> None:
        self.order = Order(len(self.train), self.session.seed)

    def step(self, step: int) -> Metrics:
        """One update on the next ``batch_size`` examples."""
        self.session.interrupt.check()
        started = time.perf_counter()
        first = step * self.stage.batch_size
        rows = [self.order[first + offset] for offset in range(self.stage.batch_size)]
        batches = self._batches(self.train, rows)
        total = sum(len(batch.targets) for batch in batches)
        found: dict[str, float] = {}

        def accumulate() -> float:
            sums = [self._gradients(batch, total) for batch in batches]
            found["entropy/policy"] = sum(entropy for _, entropy in sums)
            return sum(loss for loss, _ in sums)

        applied = self.session.updater.update(step, accumulate) or {}
        if self.session.updater.skipped_in_a_row:
            texts = [str(self.session.tokenizer.decode(self.train.tokens[row].tolist())) for row in rows]
            self.session.run.samples(
                [
                    {"step": step + 1, "kind": "skipped", "update": 1, "prompt": "", "completion": text}
                    for text in texts
                ]
            )
        cross_entropy = applied["loss"]
        return {
            "cross_entropy/data_policy": cross_entropy,
            "perplexity/policy": perplexity(cross_entropy),
            **found,
            **applied,
            "tokens_per_second": sum(len(batch.tokens) for batch in batches)
            / (time.perf_counter() - started),
        }

    def _batches(self, examples: Examples, rows: Sequence[int]) -> list[ExampleBatch]:
        """Cut a batch into micro-batches of examples of like length, so that little is padding."""
        size = self.stage.compute.micro_batch
        ordered = sorted(rows, key=lambda row: len(examples.tokens[row]))
        groups = [ordered[start : start + size] for start in range(0, len(ordered), size)]
        return [examples.batch(group, self.session.device) for group in groups]

    def _gradients(self, batch: ExampleBatch, total: int) -> tuple[float, float]:
        """Add up the gradients of one micro-batch; give its share of cross-entropy and entropy."""
        loss, scores = reduce(
            self._hidden(batch),
            self.scorer.head(self.session.model),
            batch.targets,
            lambda scores, rows: -scores["log_prob"].sum() / total,
            anchors={},
            want=SCORED,
            **self.scorer.options,
        )
        torch.autograd.backward(loss)
        return float(loss.detach()), float(scores["entropy"].sum()) / total

    def _hidden(self, batch: ExampleBatch) -> Tensor:
        compute = self.stage.compute
        model = self.session.model
        with arithmetic(model, compute.precision):
            hidden = hidden_states(model, batch.tokens, batch.lengths, layout=compute.layout)
        return hidden[batch.predicting]

    @torch.no_grad()
    def evaluate(self, step: int) -> Evaluation | None:
        """Held-out cross-entropy; the score of a model is minus that.

        Where the true distribution is known, cross-entropy = entropy/data + kl/data_policy, per token: both are
        means over the same held-out examples, of −log P and of log P − log π.
        """
        if self.heldout is None:
            return None
        batches = self._batches(self.heldout, range(len(self.heldout)))
        sums = [self._held_out_sums(batch) for batch in batches]
        count = sum(len(batch.targets) for batch in batches)
        cross_entropy = sum(nats for nats, _ in sums) / count
        metrics = {
            "cross_entropy/data_policy": cross_entropy,
            "entropy/policy": sum(nats for _, nats in sums) / count,
            "perplexity/policy": perplexity(cross_entropy),
        }
        if self.heldout.true_log_prob is not None:
            entropy = -math.fsum(self.heldout.true_log_prob) / count
            metrics |= {"entropy/data": entropy, "kl/data_policy": cross_entropy - entropy}
        return Evaluation(metrics, -cross_entropy)

    def _held_out_sums(self, batch: ExampleBatch) -> tuple[float, float]:
        head = self.scorer.head(self.session.model)
        scores = score(self._hidden(batch), head, batch.targets, want=SCORED, **self.scorer.options)
        return -float(scores["log_prob"].sum()), float(scores["entropy"].sum())

    def evaluation_due(self, step: int) -> bool:
        """Every n steps."""
        return self.stage.evaluation is not None and step % self.stage.evaluation.every == 0

    def moment(self, step: int) -> Moment:
        """Between steps."""
        return Moment(step)

    def state(self) -> dict[str, Any]:
        """Nothing: the position in the data is the step."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Nothing to take up."""
