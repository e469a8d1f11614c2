"""Which charts a page has, and the points in them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kedge.report.reading import Metrics, Run

MAX_POINTS = 2000
"""Longer lines are shown as means over equal stretches of steps."""


@dataclass(frozen=True)
class Line:
    """A metric in a chart.

    Attributes:
        metric: Its name in ``metrics.jsonl``.
        quantity: What it is called where a chart shows several.
        style: ``solid``, ``dash``, ``dot`` for lines, ``points`` for evaluations.
        otherwise: The metric to show where the run has not recorded the first.
    """

    metric: str
    quantity: str = ""
    style: str = "solid"
    otherwise: str = ""


@dataclass(frozen=True)
class Chart:
    """A chart over steps.

    Attributes:
        title: What is shown.
        unit: Its unit; one that begins with ``nats`` follows the page's switch to bits.
        lines: The metrics in it.
        log: Whether the vertical axis is logarithmic.
        note: A sentence under the title.
    """

    title: str
    unit: str
    lines: Sequence[Line]
    log: bool = False
    note: str = ""


def _both(metric: str, quantity: str = "", style: str = "solid") -> list[Line]:
    """Give the metric in training and, as points, on held-out prompts."""
    return [Line(metric, quantity, style), Line(f"eval/{metric}", quantity, "points")]


_KL = "kl/policy_reference/exact"
_ANCHOR = [
    Chart(
        "KL(policy ‖ reference)",
        "nats per token",
        [*_both(_KL), Line("anchor/budget", "budget", "dash")],
    ),
    Chart(
        "KL(policy ‖ reference)",
        "nats per response",
        [*_both(f"{_KL}_per_response"), Line("anchor/budget_per_response", "budget", "dash")],
    ),
    Chart(
        "KL(reference ‖ policy)",
        "nats per token",
        [Line("kl/reference_policy/exact"), Line("anchor/forward_budget", "budget", "dash")],
        note="where the policy goes",
    ),
    Chart(
        "KL(reference ‖ policy)",
        "nats per response",
        [
            Line("kl/reference_policy/exact_per_response"),
            Line("anchor/forward_budget_per_response", "budget", "dash"),
        ],
        note="where the policy goes",
    ),
    Chart("β", "advantage per nat", [Line("anchor/beta")], log=True, note="weight of the anchor"),
]
_LANGUAGE = [
    Chart("Entropy of the policy", "nats per token", _both("entropy/policy")),
    Chart("Perplexity", "of responses under the reference", _both("perplexity/reference"), log=True),
    Chart("Length", "tokens per response", _both("length/mean")),
]
_UPDATE = [
    Chart("Clipped low", "share of tokens", [Line("trust_region/clip_fraction_low")]),
    Chart("Clipped high", "share of tokens", [Line("trust_region/clip_fraction_high")]),
    Chart(
        "KL(old ‖ policy)",
        "nats per token",
        [Line("kl/old_policy/exact", otherwise="kl/old_policy/k3")],
        note="moved in a step",
    ),
    Chart(
        "KL(old ‖ policy) after the step",
        "nats per token",
        [Line("kl/old_policy/exact_after_step"), Line("trust_region/target", "target", "dash")],
        note="what the penalty's β goes by",
    ),
    Chart(
        "β of the penalty",
        "advantage per nat",
        [Line("trust_region/beta")],
        log=True,
        note="weight of KL(old ‖ policy)",
    ),
    Chart("Masked", "share of tokens", [Line("trust_region/masked_fraction")]),
    Chart("Cut by the length limit", "share of responses", _both("length/truncated_fraction")),
    Chart("Gradient norm", "before clipping", [Line("gradient/norm")], log=True),
    Chart("Speed", "tokens per second", [Line("tokens_per_second")]),
]
_CRITIC = [
    Chart(
        "Explained variance",
        "1 is perfect",
        [Line("critic/explained_variance")],
    ),
    Chart(
        "Values and returns",
        "reward",
        [
            Line("critic/value_mean", "values"),
            Line("critic/return_mean", "returns", "dash"),
        ],
    ),
    Chart("Value loss", "", [Line("critic/loss")], log=True),
    Chart("Gradient norm of the critic", "before clipping", [Line("critic/gradient_norm")], log=True),
]
_SFT = [
    Chart(
        "Cross-entropy",
        "nats per token",
        [
            *_both("cross_entropy/data_policy", "H(data, policy)"),
            Line("eval/entropy/data", "H(data)", "dash"),
            Line("entropy/policy", "H(policy)", "dot"),
        ],
    ),
    Chart(
        "KL(data ‖ policy)",
        "nats per token",
        _both("kl/data_policy"),
        log=True,
        note="what is left to learn",
    ),
    Chart("Perplexity", "", _both("perplexity/policy"), log=True),
]


_REWARD_MODEL = [
    Chart(
        "Accuracy",
        "share of pairs",
        [*_both("preference/accuracy"), Line("eval/preference/accuracy_bayes", "at best", "dash")],
    ),
    Chart(
        "Cross-entropy",
        "nats per pair",
        [
            *_both("preference/cross_entropy"),
            Line("eval/preference/cross_entropy_bayes", "at best", "dash"),
        ],
    ),
    Chart(
        "Calibration",
        "expected error",
        [Line("eval/preference/calibration_error", "calibration error", "points")],
        note="confidence against accuracy",
    ),
    Chart("Margin", "r(chosen) − r(rejected)", _both("preference/margin_mean")),
]


def sections(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Collect the charts for some runs, what is asked first before what explains it; empty charts are left out.

    Returns:
        For each section its ``title``, whether it is a ``detail`` and its ``charts``, of what JSON can hold. A
        chart has ``title``, ``unit``, ``log``, ``note`` and ``lines``; a line has the ``run``'s index,
        ``quantity``, ``style``, ``x``, ``y`` and, where the metric has a standard error, ``error``.
    """
    sft = [(index, run) for index, run in enumerate(runs) if run.kind == "sft"]
    policy = [(index, run) for index, run in enumerate(runs) if run.kind == "policy"]
    scorers = [(index, run) for index, run in enumerate(runs) if run.kind == "reward"]
    found = [
        ("Reward", False, [_chart(chart, policy) for chart in _reward_charts([run for _, run in policy])]),
        ("Anchor", False, [_chart(chart, policy) for chart in _ANCHOR]),
        ("Reward against distance", False, _frontiers(policy)),
        ("Language", True, [_chart(chart, policy) for chart in _LANGUAGE]),
        ("Critic", True, [_chart(chart, policy) for chart in _CRITIC]),
        ("Updates", True, [_chart(chart, policy) for chart in _UPDATE]),
        ("Reward model", True, [_chart(chart, scorers) for chart in _REWARD_MODEL]),
        ("Supervised fine-tuning", True, [_chart(chart, sft) for chart in _SFT]),
    ]
    kept = [(title, detail, [chart for chart in charts if chart["lines"]]) for title, detail, charts in found]
    return [{"title": title, "detail": detail, "charts": charts} for title, detail, charts in kept if charts]


def _reward_charts(runs: Sequence[Run]) -> list[Chart]:
    names = list(dict.fromkeys(name for run in runs for name in run.rewards))
    trained = [name for name in names if all(_same(run, "reward/mean", f"reward/{name}") for run in runs)]
    named = [
        Chart(f"Reward: {name}", "trained on" if name in trained[:1] else "", _both(f"reward/{name}"))
        for name in names
    ]
    return named if trained else [Chart("Reward", "the sum, trained on", _both("reward/mean")), *named]


def _same(run: Run, first: str, second: str) -> bool:
    rows = [row for row in run.metrics if first in row]
    return all(row[first] == row.get(second) or row[first] != row[first] for row in rows)


def _chart(chart: Chart, runs: Iterable[tuple[int, Run]]) -> dict[str, Any]:
    lines = [line for index, run in runs for line in _lines(chart, index, run)]
    return {
        "kind": "steps",
        "title": chart.title,
        "unit": chart.unit,
        "log": chart.log or _dwarfed_budget(lines),
        "note": chart.note,
        "lines": lines,
    }


def _dwarfed_budget(lines: Sequence[Mapping[str, Any]]) -> bool:
    """Tell whether a budget would be flat on the ground of a linear axis, beside a run that is far above it."""
    budgets = [value for line in lines if line["quantity"] == "budget" for value in line["y"] if value]
    values = [value for line in lines if line["quantity"] != "budget" for value in line["y"] if value]
    return bool(budgets) and max(values, default=0.0) > 8 * min(budgets)


def _lines(chart: Chart, index: int, run: Run) -> list[dict[str, Any]]:
    found = []
    for line in chart.lines:
        recorded = any(line.metric in row for row in run.metrics)
        metric = line.metric if recorded or not line.otherwise else line.otherwise
        points = [(row["step"], row[metric]) for row in run.metrics if metric in row]
        if any(math.isfinite(value) for _, value in points):
            steps, values = _thin(points)
            entry = {"run": index, "quantity": line.quantity, "style": line.style, "x": steps, "y": values}
            error = f"{line.metric}_se"
            if line.style == "points" and any(error in row for row in run.metrics):
                errors = [row.get(error, math.nan) for row in run.metrics if line.metric in row]
                entry["error"] = _thin([(0, value) for value in errors])[1]
            found.append(entry)
    return found


def _thin(points: Sequence[tuple[int | float, int | float]]) -> tuple[list[int | float], list[float | None]]:
    """Take means over equal stretches where there are too many points; round; NaN becomes None."""
    size = math.ceil(len(points) / MAX_POINTS) or 1
    stretches = [points[start : start + size] for start in range(0, len(points), size)]
    return (
        [stretch[-1][0] for stretch in stretches],
        [_rounded(_mean([value for _, value in stretch])) for stretch in stretches],
    )


def _mean(values: Sequence[int | float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return math.fsum(finite) / len(finite) if finite else math.nan


def _rounded(value: int | float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _frontiers(runs: Sequence[tuple[int, Run]]) -> list[dict[str, Any]]:
    """Rewards against the root of the KL of a response: at evaluations or, where there is only one, at steps."""
    names = list(dict.fromkeys(name for _, run in runs for name in run.rewards)) or ["mean"]
    found = []
    for name in names:
        lines = [line for index, run in runs if (line := _frontier(f"reward/{name}", index, run))]
        found.append(
            {
                "kind": "frontier",
                "title": f"Reward: {name}" if name != "mean" else "Reward",
                "unit": "against √KL per response",
                "log": False,
                "note": "",
                "lines": lines,
            }
        )
    return found


def _frontier(metric: str, index: int, run: Run) -> dict[str, Any] | None:
    distance = f"{_KL}_per_response"
    evaluated: Sequence[Metrics] = [row for row in run.evaluations if metric in row and distance in row]
    rows = (
        evaluated if len(evaluated) > 1 else [row for row in run.metrics if metric in row and distance in row]
    )
    points = [
        (row["step"], math.sqrt(max(0.0, row[distance])), row[metric])
        for row in rows
        if math.isfinite(row[distance]) and math.isfinite(row[metric])
    ]
    if not points:
        return None
    stride = math.ceil(len(points) / MAX_POINTS)
    steps, x, y = zip(*points[::stride], strict=True)
    return {
        "run": index,
        "quantity": "",
        "style": "path",
        "step": list(steps),
        "x": [_rounded(value) for value in x],
        "y": [_rounded(value) for value in y],
    }
