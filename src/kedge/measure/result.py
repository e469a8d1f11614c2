"""What a comparison found."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from kedge.measure.figures import Figures
from kedge.measure.questions import QUESTIONS, Question
from kedge.measure.table import TokenTable
from kedge.runs.audit import FORMAT


@dataclass(frozen=True)
class Floor:
    """KL of a model to itself, between two passes that differ in the batch alone: what rounding makes.

    Attributes:
        tokens: how many were looked at, the first ones of the question.
        mean: nats per token.
        largest: nats.
    """

    tokens: int
    mean: float
    largest: float


@dataclass(frozen=True)
class Answer:
    """The answer to one question.

    Attributes:
        question: which one.
        partial: whether the comparison was interrupted before all was scored.
        counts: ``prompts`` or ``texts``, ``responses``, ``tokens`` scored, and ``finished``, responses that ended
            by themselves (not for texts).
        figures: the figures with their uncertainty.
        floor: the noise floor of each model, by name.
        by_cluster: one line a prompt or text.
        by_position: KL by position in the response.
        by_token: tokens of the vocabulary that moved most.
        most_moved: places that moved most, with their contexts.
        tokens: every scored token's values.
        texts: for each row of ``tokens``: ``text``, what it adds to the response's text; ``policy_top_text``,
            ``reference_top_text``, the most probable tokens'.
    """

    question: Question
    partial: bool
    counts: dict[str, int]
    figures: Figures
    floor: dict[str, Floor]
    by_cluster: list[dict[str, Any]]
    by_position: list[dict[str, Any]]
    by_token: dict[str, list[dict[str, Any]]]
    most_moved: dict[str, list[dict[str, Any]]]
    tokens: TokenTable
    texts: dict[str, list[str]]

    def __getitem__(self, figure: str) -> float:
        """Return a figure's value by its name in ``figures.estimates``."""
        return self.figures.estimates[figure].value


@dataclass(frozen=True)
class Comparison:
    """What a comparison found: the answer to each question asked, by the question's name.

    Attributes:
        answers: in the order policy_responses, reference_responses, texts; those that were asked.
        policy: what the policy is: source, fingerprint, dtype, sizes.
        reference: the same of the reference.
        settings: of the comparison.
        environment: versions, machine, seed.
        vocabulary: tokens that probabilities are spread over; rows beyond, padding, are left out.
        notes: what a reader should know.
        seconds: wall-clock time.
        complete: whether everything that was asked has been scored.
    """

    answers: dict[str, Answer]
    policy: dict[str, Any]
    reference: dict[str, Any]
    settings: dict[str, Any]
    environment: dict[str, Any]
    vocabulary: int
    notes: list[str]
    seconds: float
    complete: bool = True

    @property
    def partial(self) -> bool:
        """Whether anything is missing: of an answer, or a whole answer."""
        return not self.complete or any(answer.partial for answer in self.answers.values())

    def __getitem__(self, question: str) -> Answer:
        """Return the answer to a question by its name."""
        return self.answers[question]

    def largest(self) -> float:
        """Largest headline figure: the mean per-token KL that ``--fail-above`` looks at; NaN if any of them is."""
        found = [answer[name] for answer in self.answers.values() for name in answer.question.headline]
        return math.nan if any(map(math.isnan, found)) else max(found)

    def summary(self) -> dict[str, Any]:
        """Everything but the single tokens, as JSON can hold it: the content of ``measure.json``."""
        found: dict[str, Any] = _plain(
            {
                "format": FORMAT,
                "partial": self.partial,
                "policy": self.policy,
                "reference": self.reference,
                "vocabulary": self.vocabulary,
                "settings": self.settings,
                "environment": self.environment,
                "seconds": self.seconds,
                "notes": self.notes,
                "largest_headline": self.largest(),
                "questions": {
                    name: _summary(self.answers[name]) for name in QUESTIONS if name in self.answers
                },
            }
        )
        return found


def _summary(answer: Answer) -> dict[str, Any]:
    question, figures = answer.question, answer.figures
    return {
        "title": question.title,
        "estimates": question.estimates,
        "headline": list(question.headline),
        "cluster": question.cluster,
        "partial": answer.partial,
        "counts": answer.counts,
        "figures": {name: dataclasses.asdict(each) for name, each in figures.estimates.items()},
        "distribution": figures.distribution,
        "log_prob_correlation": figures.correlation,
        "needed": dataclasses.asdict(figures.needed),
        "noise_floor": {name: dataclasses.asdict(floor) for name, floor in answer.floor.items()},
        "by_cluster": answer.by_cluster,
        "by_position": answer.by_position,
        "by_token": answer.by_token,
        "most_moved": answer.most_moved,
    }


def _plain(value: Any) -> Any:
    """Replace what JSON has no number for: NaN by null, infinities by the strings "Infinity", "-Infinity"."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    return value
