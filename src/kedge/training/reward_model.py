"""Training a reward model: the Bradley–Terry loss on preference pairs, with accuracy and calibration."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kedge.data import Order
from kedge.objective import bradley_terry_loss
from kedge.training.checkpoint import Moment
from kedge.training.config import RewardStage
from kedge.training.loop import Evaluation, Metrics, Session
from kedge.training.measures import bayes_metrics, preference_metrics
from kedge.training.pairs import Pairs
from kedge.training.scoring import scored_sequences


@dataclass
class RewardWork:
    """The steps of a reward model; the position in the data is all that is carried on."""

    session: Session
    stage: RewardStage
    train: Pairs
    heldout: Pairs | None
    order: Order = field(init=False)

    def __post_init__(self) -> None:
        self.order = Order(len(self.train), self.session.seed)

    def step(self, step: int) -> Metrics:
        """One update on the next ``batch_size`` pairs."""
        self.session.interrupt.check()
        started = time.perf_counter()
        first = step * self.stage.batch_size
        rows = [self.order[first + offset] for offset in range(self.stage.batch_size)]
        found: list[Tensor] = []

        def accumulate() -> float:
            total = 0.0
            for part in self._parts(self.train, rows):
                chosen, rejected = self._scores(self.train, part)
                margins = self.train.margins[list(part)].to(chosen)
                loss = bradley_terry_loss(chosen, rejected, margins).sum() / len(rows)
                torch.autograd.backward(loss)
                total += float(loss.detach())
                found.append(torch.stack([chosen.detach(), rejected.detach()]))
            return total

        applied = self.session.updater.update(step, accumulate) or {}
        if self.session.updater.skipped_in_a_row:
            self._keep_skipped(step, rows)
        chosen, rejected = torch.cat(found, dim=1)
        tokens = sum(len(sequence) for sequence in self.train.sequences(rows))
        return {
            **preference_metrics(chosen, rejected),
            **applied,
            "tokens_per_second": tokens / (time.perf_counter() - started),
        }

    def _parts(self, pairs: Pairs, rows: Sequence[int]) -> list[Sequence[int]]:
        """Cut a batch into micro-batches of pairs of like length; both sides of a pair are in one pass."""
        size = self.stage.compute.micro_batch // 2
        ordered = sorted(rows, key=pairs.longer)
        return [ordered[start : start + size] for start in range(0, len(ordered), size)]

    def _scores(self, pairs: Pairs, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        scores = scored_sequences(self.session.model, pairs.sequences(rows), self.stage.compute)
        return scores[: len(rows)], scores[len(rows) :]

    def _keep_skipped(self, step: int, rows: Sequence[int]) -> None:
        texts = [str(self.session.tokenizer.decode(each.tolist())) for each in self.train.sequences(rows)]
        self.session.run.samples(
            [
                {"step": step + 1, "kind": "skipped", "update": 1, "prompt": "", "completion": text}
                for text in texts
            ]
        )

    @torch.no_grad()
    def evaluate(self, step: int) -> Evaluation | None:
        """Held-out accuracy, cross-entropy and calibration; the score of a model is minus the cross-entropy."""
        if self.heldout is None:
            return None
        parts = self._parts(self.heldout, range(len(self.heldout)))
        scores = [torch.stack(self._scores(self.heldout, part)) for part in parts]
        chosen, rejected = torch.cat(scores, dim=1)
        metrics = preference_metrics(chosen, rejected)
        if self.heldout.true_preference is not None:
            metrics |= bayes_metrics(self.heldout.true_preference)
        return Evaluation(metrics, -metrics["preference/cross_entropy"])

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
