"""The verdict on each objective: how far from the optimum it ends, beside where theory says that it ends."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from kedge.certify.judge.learner import STEPS, Learner, follow_expected, follow_sampled
from kedge.certify.judge.objectives import OBJECTIVES, Objective
from kedge.certify.judge.predictions import optimum
from kedge.certify.judge.task import Task, tree

BETA = 1.0
NEAR = 1e-3
"""Total variation that expected gradients may leave between where an objective ends and where it should."""
NEAR_SAMPLED = 8e-3
"""The same of drawn responses: twice their noise, and less than half of what lies between any two predictions."""
GONE = 1e-9
"""A response below this probability has been lost: the objective has run away."""


@dataclass(frozen=True)
class Verdict:
    """Where an objective ended; distances are total variations between distributions over responses.

    Args:
        objective: How it is put together.
        predicted: From the optimum to the prediction; None where there is none.
        expected: From the optimum to where expected gradients led.
        expected_error: From the prediction to there; None where there is no prediction.
        sampled: From the optimum to where drawn responses led; None if none were drawn.
        sampled_error: From the prediction to there.
        least: Probability of the least likely response where expected gradients led.
    """

    objective: Objective
    predicted: float | None
    expected: float
    expected_error: float | None
    sampled: float | None
    sampled_error: float | None
    least: float

    @property
    def passed(self) -> bool:
        """Whether it ended where it should, or ran away as it should."""
        if self.expected_error is None:
            return self.least < GONE
        return self.expected_error <= NEAR and (self.sampled_error or 0.0) <= NEAR_SAMPLED


def verdicts(
    *,
    task: Task | None = None,
    beta: float = BETA,
    objectives: Sequence[Objective] = OBJECTIVES,
    steps: int = STEPS,
    sampled: bool = False,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float64,
) -> Iterator[Verdict]:
    """Follow every objective to where it ends and measure how far that is from π* ∝ ρ·exp(r/β).

    Losses, advantages, weights and gradients are those of the functions that training calls; the optimum and the
    predictions are computed without them. It takes some seconds an objective, with drawn responses half a minute.

    Args:
        task: The task; by default one whose responses have up to three tokens, out of three.
        beta: β, in reward per nat.
        objectives: Which.
        steps: Updates by expected gradients.
        sampled: Whether to follow each with drawn responses, too.
        device: Where Kedge's functions run.
        dtype: Of hidden states and heads.

    >>> task = tree(0, longest=1)
    >>> [verdict.passed for verdict in verdicts(task=task, objectives=OBJECTIVES[:1], steps=50)]
    [True]
    """
    task = tree(0, dtype=dtype) if task is None else task
    best, where = optimum(task, beta), torch.device(device)
    for objective in objectives:
        predicted = None if objective.predicted is None else objective.predicted(task, beta)
        found = follow_expected(Learner(task, objective, beta, where, dtype), steps)
        drawn = follow_sampled(Learner(task, objective, beta, where, dtype), seed=0) if sampled else None
        yield Verdict(
            objective=objective,
            predicted=_apart(predicted, best),
            expected=float(0.5 * (found - best).abs().sum()),
            expected_error=_apart(predicted, found),
            sampled=_apart(drawn, best),
            sampled_error=_apart(drawn, predicted),
            least=float(found.min()),
        )


def print_verdicts(found: Sequence[Verdict], console: Console | None = None) -> None:
    """Print where each objective ends, then how many end where they should.

    Args:
        found: What `verdicts` gave.
        console: Where to; standard output by default.
    """
    console = console or Console()
    title = Text("Total variation from the optimum of E[r] − β KL(π‖ρ)", style="italic")
    table = Table(title=title, title_justify="left")
    for heading in ("objective", "ends at", "theory", "expected", "sampled", ""):
        numbers = heading in ("theory", "expected", "sampled")
        table.add_column(heading, justify="right" if numbers else "left", no_wrap=numbers)
    for each in found:
        verdict = Text("holds", style="green") if each.passed else Text("FAILS", style="bold red")
        figures = (
            "" if figure is None else f"{figure:.3f}"
            for figure in (each.predicted, each.expected, each.sampled)
        )
        table.add_row(Text(each.objective.name), Text(each.objective.ends), *figures, verdict)
    console.print(table)
    passed = sum(each.passed for each in found)
    drawn = any(each.sampled is not None for each in found)
    console.print(
        f"{passed} of {len(found)} end where theory says, within a total variation of {NEAR:g} by expected gradients"
        f"{f', of {NEAR_SAMPLED:g} with drawn responses' if drawn else ''}.",
        highlight=False,
    )


def _apart(p: Float[Tensor, " R"] | None, q: Float[Tensor, " R"] | None) -> float | None:
    return None if p is None or q is None else float(0.5 * (p - q).abs().sum())
