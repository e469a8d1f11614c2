"""From what was scored to the comparison, and to its files."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

from kedge.errors import RunError
from kedge.measure.answer import answer
from kedge.measure.config import MeasureConfig
from kedge.measure.files import write, write_tokens
from kedge.measure.inputs import window_length
from kedge.measure.models import SIDES, Models
from kedge.measure.pieces import Pieces
from kedge.measure.pipeline import Work
from kedge.measure.result import Comparison
from kedge.measure.table import TokenTable
from kedge.runs import environment
from kedge.runs.audit import TOKENS
from kedge.runs.interrupt import Interrupted


def conclusion(
    works: list[Work], models: Models, config: MeasureConfig, started: float, out: Path | None, *notes: str
) -> Comparison:
    """Make the figures of what was scored, and write them if a folder is given.

    Args:
        works: scored, or some of them, or each in part.
        models: what was compared.
        config: its settings.
        started: when, by ``time.perf_counter``.
        out: the folder; without figures, the values of the tokens go there.
        notes: what a reader should know beside what is said anyway.

    Raises:
        Interrupted: nothing was scored.
        RunError: no figures could be made, or the folder cannot be written.
    """
    if not any(work.tables for work in works):
        raise Interrupted("stopped before anything was scored; there is nothing to keep")
    try:
        comparison = _comparison(works, models, config, started, [*notes, *_notes(works, models)])
    except Exception as error:
        if out is None:
            raise
        write_tokens({work.question.name: TokenTable.join(work.tables) for work in works if work.tables}, out)
        raise RunError(
            f"no figures could be made of what was scored ({error}); the values of every scored token are in "
            f"{out / TOKENS}, without texts"
        ) from error
    if out is not None:
        write(comparison, out)
    return comparison


def _comparison(
    works: list[Work], models: Models, config: MeasureConfig, started: float, notes: list[str]
) -> Comparison:
    pieces, facts = Pieces(models.tokenizer), models.facts
    return Comparison(
        answers={work.question.name: answer(work, pieces, config) for work in works if work.tables},
        policy=facts["policy"],
        reference=facts["reference"],
        settings={
            **dataclasses.asdict(config),
            "device": str(models.device),
            "window": window_length(config, models.context) if any(map(_of_texts, works)) else None,
        },
        environment=environment(
            device=str(models.device), seed=config.seed, reference=facts["reference"]["fingerprint"]
        ),
        vocabulary=models.vocabulary,
        notes=notes,
        seconds=time.perf_counter() - started,
        complete=all(work.complete for work in works),
    )


def _of_texts(work: Work) -> bool:
    return work.question.sampled_from is None


def _notes(works: list[Work], models: Models) -> list[str]:
    """Say what a reader of the figures should know."""
    notes = list(models.notes)
    if models.facts["policy"]["fingerprint"] == models.facts["reference"]["fingerprint"]:
        notes.append("policy and reference have the same weights, to the bit")
    ends = [models.facts[side]["end_tokens"] for side in SIDES]
    if set(ends[0]) != set(ends[1]) and not all(map(_of_texts, works)):
        notes.append(
            f"responses of the policy end at the tokens {ends[0]}, those of the reference at {ends[1]}: the KLs per "
            "response are of responses that end differently"
        )
    for work in works:
        question = work.question
        if not work.complete:
            done = sum(len(table.response.unique()) for table in work.tables)
            notes.append(f"{question.title}: partial, ended after {done} sequences")
        if len({window.cluster for window in work.windows}) == 1:
            kind = "responses to it" if question.sampled_from else "windows"
            notes.append(f"{question.title}: one {question.cluster} alone; errors are those of the {kind}")
    return notes
