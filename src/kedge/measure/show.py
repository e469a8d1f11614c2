"""A comparison on the screen."""

from __future__ import annotations

import math
from collections.abc import Iterator

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kedge.measure.result import Answer, Comparison
from kedge.statistics import Estimate

_LINES = (
    ("reverse_kl_per_response", "KL(policy‖reference), nats/response"),
    ("forward_kl_per_response", "KL(reference‖policy), nats/response"),
    ("k1_per_response", "  k1, sampled"),
    ("k3_per_response", "  k3, sampled"),
    ("reverse_kl", "KL(policy‖reference), nats/token"),
    ("forward_kl", "KL(reference‖policy), nats/token"),
    ("same_top_token", "same top token, %"),
    ("probability_change", "change of the token's probability, %"),
    ("probability_change_rms", "  its root mean square, %"),
    ("policy_perplexity", "perplexity of the policy"),
    ("reference_perplexity", "perplexity of the reference"),
    ("perplexity_ratio", "  their ratio"),
    ("policy_entropy", "entropy of the policy, nats/token"),
    ("reference_entropy", "entropy of the reference, nats/token"),
)
_COLUMNS = ("median", "p90", "p95", "p99", "p99.9", "max")


def show(comparison: Comparison, console: Console | None = None) -> None:
    """Print what was found: for each question its figures with intervals, quantiles, the noise floor.

    Args:
        comparison: what was found.
        console: where to print; standard output when left out.
    """
    console = console or Console()
    for answer in comparison.answers.values():
        for part in _parts(answer, float(comparison.settings["confidence"])):
            console.print(part)
    for note in comparison.notes:
        console.print(Text(f"note: {note}"))


def _parts(answer: Answer, confidence: float) -> Iterator[Text | Table]:
    partial = "PARTIAL: " if answer.partial else ""
    counts = ", ".join(f"{count:,} {name}" for name, count in answer.counts.items())
    yield Text(f"\n{partial}{answer.question.title}: {counts}", style="bold")
    table = Table(box=SIMPLE_HEAD, header_style="bold", pad_edge=False)
    for title in ("", "value", "± s.e.", f"{100 * confidence:g}% interval"):
        table.add_column(title, justify="right" if title else "left", no_wrap=True)
    for name, title in _LINES:
        estimate = answer.figures.estimates.get(name)
        if estimate is not None:
            table.add_row(*map(Text, (title, *_cells(estimate, 100.0 if title.endswith("%") else 1.0))))
    table.add_row("correlation of log-probabilities", _number(answer.figures.correlation), "", "")
    yield table
    yield _quantiles(answer)
    yield Text(_floor(answer))
    yield Text(_needed(answer))


def _quantiles(answer: Answer) -> Table:
    table = Table(box=SIMPLE_HEAD, header_style="bold", pad_edge=False)
    table.add_column("per-token KL, nats", no_wrap=True)
    for column in _COLUMNS:
        table.add_column(column, justify="right", no_wrap=True)
    for name, title in (("reverse_kl", "KL(policy‖reference)"), ("forward_kl", "KL(reference‖policy)")):
        found = answer.figures.distribution[name]
        table.add_row(title, *(_number(found[column], 3) for column in _COLUMNS))
    return table


def _floor(answer: Answer) -> str:
    floors = ", ".join(
        f"{side} {floor.mean:.1e} (largest {floor.largest:.1e})" for side, floor in answer.floor.items()
    )
    return f"noise floor (a model against itself, nats/token): {floors}"


def _needed(answer: Answer) -> str:
    needed, word = answer.figures.needed, answer.question.cluster
    if math.isnan(needed.half_width):
        return f"the KL is not finite: no number of {word}s gives it an interval"
    if needed.half_width <= 0:
        return "the KL is 0: there is no share of it for an interval to be as narrow as"
    wanted = f"for an interval of ± {needed.half_width:.2g}: "
    if needed.clusters is None:
        if needed.samples_per_cluster is None:
            return f"one {word} has no interval: give more"
        unit = "responses to it" if answer.question.sampled_from else "windows of it"
        return f"{wanted}one {word}, {needed.samples_per_cluster:,} {unit}"
    wanted += f"{needed.clusters:,} {word}s"
    if answer.question.sampled_from is None:
        return wanted
    wanted += " with as many responses each"
    if needed.samples_per_cluster is None:
        if answer.counts["responses"] <= answer.counts[f"{word}s"]:
            return f"{wanted}; one each does not tell what more would do"
        return f"{wanted}; more responses to these {word}s alone cannot reach it"
    more = needed.samples_per_cluster
    return f"{wanted}, or {more:,} response{'s' * (more > 1)} to each of these"


def _cells(estimate: Estimate, scale: float) -> tuple[str, str, str]:
    value, error, low, high = (
        scale * each for each in (estimate.value, estimate.standard_error, estimate.low, estimate.high)
    )
    if math.isnan(low):
        return _number(value), _number(error, 2), "–"
    bounds = (_number(bound, _digits(bound, (high - low) / 2, 3)) for bound in (low, high))
    return _number(value, _digits(value, error, 4)), _number(error, 2), " … ".join(bounds)


def _digits(value: float, spread: float, least: int) -> int:
    """Give the significant digits that show a value to the second digit of its spread.

    >>> _digits(1.00004, 6.1e-5, 4), _digits(15.86, 0.21, 4)
    (7, 4)
    """
    if not (value and spread > 0 and math.isfinite(value) and math.isfinite(spread)):
        return least
    return max(least, math.floor(math.log10(abs(value))) - math.floor(math.log10(spread)) + 2)


def _number(value: float, digits: int = 4) -> str:
    """So many significant digits.

    >>> _number(0.012345), _number(12.0), _number(1.52e-9, 2), _number(float("nan"))
    ('0.01235', '12', '1.5e-09', '–')
    """
    return "–" if math.isnan(value) else f"{value:.{digits}g}"
