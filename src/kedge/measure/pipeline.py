"""The passes of a comparison: responses drawn, hidden states of both models, every token scored."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kedge.measure.config import MeasureConfig
from kedge.measure.inputs import Window
from kedge.measure.models import SIDES, Models
from kedge.measure.parts import Part
from kedge.measure.progress import Progress
from kedge.measure.questions import Question, Side
from kedge.measure.result import Floor
from kedge.measure.store import HiddenStore
from kedge.measure.table import TokenTable
from kedge.rollout import SamplingConfig, generate
from kedge.runs.interrupt import Interrupt
from kedge.runs.seeds import generator

FLOOR_TOKENS, FLOOR_SEQUENCES = 512, 8
"""The noise floor is looked at on the first so many scored tokens of a question, in at most so many sequences."""


@dataclass
class Work:
    """A question with its data, and what has been found of it so far.

    Attributes:
        question: which one.
        windows: prompts or texts.
        tables: of the parts scored, in their order.
        floor: the noise floor of each model.
        finished: responses that ended by themselves.
        complete: whether every part was scored.
    """

    question: Question
    windows: list[Window]
    tables: list[TokenTable] = field(default_factory=list)
    floor: dict[str, Floor] = field(default_factory=dict)
    finished: int = 0
    complete: bool = False

    def context(self, cluster: int, response: int) -> list[int]:
        """Ids that are read before a response to a prompt, or before the scored part of a text's window."""
        place = cluster if self.question.sampled_from else response
        return self.windows[place].context


class Pipeline:
    """Runs the work of a comparison, both models side by side or one after the other.

    The parts are the same both ways, and so is every number: hidden states come back from the disk bit for bit.
    """

    def __init__(
        self, models: Models, config: MeasureConfig, backend: str, progress: Progress, interrupt: Interrupt
    ) -> None:
        self._models, self._config, self._backend = models, config, backend
        self._progress, self._interrupt = progress, interrupt

    def run(self, works: list[Work]) -> None:
        """Fill the works; an interrupt ends it after the part in hand."""
        if self._config.low_memory:
            with HiddenStore() as store:
                self._one_by_one(works, store)
        else:
            self._side_by_side(works)

    def _side_by_side(self, works: list[Work]) -> None:
        for work in works:
            total, scored = self._sequences(work), 0
            self._progress.begin(work.question.title, total, "sequences")
            for index, part in enumerate(self._parts(work)):
                hidden = {side: self._hidden(work, index, part, side) for side in SIDES}
                self._score(work, part, hidden)
                self._progress.advance(len(part.clusters))
                scored += len(part.clusters)
                if self._interrupt.requested:
                    break
            work.complete = scored == total
            if self._interrupt.requested:
                return

    def _one_by_one(self, works: list[Work], store: HiddenStore) -> None:
        """Draw and pass with one model at a time, the reference first (it is in memory), then score all."""
        drawn: dict[str, list[Part]] = {}
        for side in ("reference", "policy", "reference"):
            for work in works:
                if self._open(work, side, drawn, store) and not self._interrupt.requested:
                    self._pass(work, side, drawn, store)
        for work in works:
            parts = drawn.get(work.question.name, [])
            names = [[_name(work, index, side) for side in SIDES] for index in range(len(parts))]
            ready = [index for index, both in enumerate(names) if all(name in store for name in both)]
            if not ready:
                continue
            self._progress.begin(f"{work.question.title}: scoring", len(ready), "parts")
            for index in ready:
                hidden = {side: store.take(_name(work, index, side)) for side in SIDES}
                self._score(
                    work, parts[index], {side: each.to(self._models.device) for side, each in hidden.items()}
                )
                self._progress.advance(1)
            whole = sum(len(part.clusters) for part in parts) == self._sequences(work)
            work.complete = whole and len(ready) == len(parts)

    def _open(self, work: Work, side: Side, drawn: dict[str, list[Part]], store: HiddenStore) -> bool:
        """Whether a model has something to do for a work: draw its responses, or pass over those there are."""
        parts = drawn.get(work.question.name)
        if parts is None:
            return work.question.sampled_from in (None, side)
        return any(_name(work, index, side) not in store for index in range(len(parts)))

    def _pass(self, work: Work, side: Side, drawn: dict[str, list[Part]], store: HiddenStore) -> None:
        """Keep a model's hidden states of a work's parts, which are drawn on the way if they are not yet."""
        name = work.question.name
        self._progress.begin(f"{work.question.title}: {side}", self._sequences(work), "sequences")
        known = drawn.get(name)
        parts: list[Part] = []
        for index, part in enumerate(self._parts(work) if known is None else known):
            parts.append(part)
            store.put(_name(work, index, side), self._hidden(work, index, part, side).cpu())
            self._progress.advance(len(part.clusters))
            if self._interrupt.requested:  # before the next part is drawn
                break
        if known is None:
            drawn[name] = parts

    def _sequences(self, work: Work) -> int:
        return len(work.windows) * (self._config.responses if work.question.sampled_from else 1)

    def _parts(self, work: Work) -> Iterator[Part]:
        """Cut a work into parts; responses are drawn as they are asked for."""
        side, config = work.question.sampled_from, self._config
        if side is None:
            for start in range(0, len(work.windows), config.batch):
                yield Part.of_texts(work.windows[start : start + config.batch], start)
            return
        draw = generator(config.seed, "measure", side)
        first = 0
        for windows, each in self._batches(work.windows):
            sampling = SamplingConfig(each, config.max_new_tokens, config.temperature)
            prompts = [window.context for window in windows]
            rollout = generate(self._models.take(side), self._models.tokenizer, prompts, sampling, draw)
            clusters = torch.tensor([window.cluster for window in windows]).repeat_interleave(each)
            yield Part(rollout.to("cpu"), clusters, first)
            first += len(clusters)

    def _batches(self, windows: list[Window]) -> Iterator[tuple[list[Window], int]]:
        """Prompts of every part, and the responses to each: all of them, or as many as there is room for."""
        batch, responses = self._config.batch, self._config.responses
        step = max(1, batch // responses)
        for start in range(0, len(windows), step):
            for done in range(0, responses, batch):
                yield windows[start : start + step], min(batch, responses - done)

    def _hidden(self, work: Work, index: int, part: Part, side: Side) -> Tensor:
        """Hidden states of a part; the first part also tells the model's noise floor."""
        model = self._models.take(side)
        hidden = part.hidden(model)
        if index == 0:
            start = part.start(FLOOR_TOKENS, FLOOR_SEQUENCES)
            again = start.hidden_in_other_shapes(model)
            kl = start.apart(hidden[: len(again)], again, self._models.heads[side], self._config.temperature)
            work.floor[side] = Floor(len(kl), float(kl.mean()), float(kl.max()))
        return hidden

    def _score(self, work: Work, part: Part, hidden: dict[Side, Tensor]) -> None:
        policy, reference = ((hidden[side], self._models.heads[side]) for side in SIDES)
        work.tables.append(
            part.scored(policy, reference, temperature=self._config.temperature, backend=self._backend)
        )
        work.finished += int(part.rollout.finished.sum())


def _name(work: Work, index: int, side: Side) -> str:
    return f"{work.question.name}-{index}-{side}"
