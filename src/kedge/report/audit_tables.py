"""The tables of an audit: what stands in each, in words and numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kedge.report.audit import BOTH, Audit, number
from kedge.report.numbers import count, duration, figure

MAX_CLUSTERS = 200
"""Prompts or texts in the table of them."""
SHOWN = 220
"""Characters of a prompt or text in that table."""
QUANTILES = {
    "median": "median",
    "p90": "90 %",
    "p95": "95 %",
    "p99": "99 %",
    "p99.9": "99.9 %",
    "max": "largest",
}
MOVED = {
    "reverse_kl": "Largest KL(policy ‖ reference)",
    "forward_kl": "Largest KL(reference ‖ policy)",
    "raised": "Made more probable by the policy",
    "lowered": "Made less probable by the policy",
}


@dataclass(frozen=True)
class Cell:
    """A number of a table.

    Attributes:
        value: The number.
        decimals: That it is shown with.
        nats: Whether it follows the page's switch to bits.
    """

    value: float
    decimals: int = 4
    nats: bool = True

    @property
    def text(self) -> str:
        """Write it."""
        return figure(self.value, self.decimals)


@dataclass(frozen=True)
class Row:
    """A figure with its uncertainty; ``minor`` ones stand beside the one above."""

    title: str
    unit: str
    value: Cell
    error: Cell
    low: Cell
    high: Cell
    minor: bool = False


@dataclass(frozen=True)
class _Line:
    name: str
    title: str
    unit: str
    decimals: int = 4
    scale: float = 1.0
    minor: bool = False


_PER_RESPONSE = (
    *(_Line(f"{name}_per_response", title, "nats per response", 3) for name, title in BOTH.items()),
    _Line("k1_per_response", "k1, sampled", "nats per response", 3, minor=True),
    _Line("k3_per_response", "k3, sampled", "nats per response", 3, minor=True),
)
_SAMPLED = (
    _Line("k1", "k1, sampled", "nats per token", minor=True),
    _Line("k3", "k3, sampled", "nats per token", minor=True),
)
_PREDICTION = (
    _Line("same_top_token", "same top token", "% of tokens", 2, 100.0),
    _Line("probability_change", "change of the token’s probability", "%", 3, 100.0),
    _Line("probability_change_rms", "root mean square", "%", 3, 100.0, minor=True),
    _Line("policy_perplexity", "perplexity of the policy", "", 3),
    _Line("reference_perplexity", "perplexity of the reference", "", 3),
    _Line("perplexity_ratio", "ratio", "", 4, minor=True),
    _Line("policy_entropy", "entropy of the policy", "nats per token"),
    _Line("reference_entropy", "entropy of the reference", "nats per token"),
)


def rows(question: Mapping[str, Any]) -> list[Row]:
    """Every figure of a question with its interval, the headline first."""
    headline = [name for name in BOTH if name in question["headline"]]
    other = [name for name in BOTH if name not in question["headline"]]
    lines = [
        *_PER_RESPONSE,
        *(_Line(name, BOTH[name], "nats per token") for name in headline),
        *_SAMPLED,
        *(_Line(name, BOTH[name], "nats per token") for name in other),
        *_PREDICTION,
    ]
    found = question["figures"]
    return [_row(found[line.name], line) for line in lines if line.name in found]


def overview(audit: Audit) -> list[dict[str, Any]]:
    """The answers, one line for each headline figure."""
    found = []
    for name, question in audit.questions.items():
        figures = question["figures"]
        for direction in question["headline"]:
            per_response = figures.get(f"{direction}_per_response")
            floors = [number(floor["mean"]) for floor in question["noise_floor"].values()]
            found.append(
                {
                    "question": name,
                    "title": question["title"],
                    "partial": question["partial"],
                    "pair": BOTH[direction],
                    "token": _row(figures[direction], _Line("", "", "nats per token")),
                    "response": per_response and _row(per_response, _Line("", "", "nats per response", 3)),
                    "floor": Cell(max(floors, default=math.nan)),
                    "same": Cell(100 * number(figures["same_top_token"]["value"]), 1, nats=False),
                    "counts": counts(question),
                }
            )
    return found


def counts(question: Mapping[str, Any]) -> str:
    """Say how much was compared.

    >>> counts({"counts": {"prompts": 64, "responses": 256, "tokens": 5120}})
    '64 prompts · 256 responses · 5,120 tokens'
    """
    windows = question.get("cluster") == "text"
    names = {"responses": "windows" if windows else "responses", "finished": "ended by themselves"}
    return " · ".join(f"{value:,} {names.get(name, name)}" for name, value in question["counts"].items())


def quantiles(question: Mapping[str, Any]) -> list[tuple[str, list[Cell]]]:
    """Quantiles of the per-token KL, both ways."""
    return [
        (title, [Cell(number(question["distribution"][name][key])) for key in QUANTILES])
        for name, title in BOTH.items()
    ]


def changes(question: Mapping[str, Any]) -> list[tuple[str, Cell]]:
    """Quantiles of the change of the given token's probability, in per cent."""
    found = question["distribution"]["probability_change"]
    names = {"min": "smallest", "p0.1": "0.1 %", "p1": "1 %", "p5": "5 %", "p25": "25 %", **QUANTILES}
    return [
        (title, Cell(100 * number(found[key]), 2, nats=False)) for key, title in names.items() if key in found
    ]


def floors(question: Mapping[str, Any]) -> list[tuple[str, Cell, Cell, int]]:
    """The noise floor of each model: its mean, its largest, over how many tokens."""
    return [
        (side, Cell(number(floor["mean"])), Cell(number(floor["largest"])), int(floor["tokens"]))
        for side, floor in question["noise_floor"].items()
    ]


def needed(question: Mapping[str, Any]) -> str:
    """Say what an interval of the wanted width needs.

    >>> needed({"needed": {"half_width": 0.05, "clusters": 81, "samples_per_cluster": None}, "cluster": "text"})
    'An interval of ± 0.050 nats per token needs 81 texts.'
    """
    wanted, word = question["needed"], question["cluster"]
    if not number(wanted["half_width"]) > 0:
        reason = "not finite" if wanted["half_width"] is None else "0"
        return f"The KL is {reason}, so there is no share of it for an interval to be as narrow as."
    if wanted["clusters"] is None and wanted["samples_per_cluster"] is None:
        return f"A single {word} has no interval: give more."
    unit = "nats per response" if word == "prompt" else "nats per token"
    said = f"An interval of ± {figure(number(wanted['half_width']))} {unit} needs "
    if wanted["clusters"] is None:
        draws = "responses to this prompt" if word == "prompt" else "windows of this text"
        return f"{said}{wanted['samples_per_cluster']:,} {draws}."
    said += f"{wanted['clusters']:,} {word}s"
    if word == "text":
        return f"{said}."
    if wanted["samples_per_cluster"] is None:
        if question["counts"]["responses"] <= question["counts"]["prompts"]:
            return f"{said} with as many responses each; one each does not tell what more would do."
        return f"{said} with as many responses each; more responses to these alone cannot do it."
    each = wanted["samples_per_cluster"]
    responses = f"{each:,} response{'s' * (each != 1)}"
    return f"{said} with as many responses each, or {responses} to each of these."


def clusters(question: Mapping[str, Any]) -> dict[str, Any]:
    """Prompts or texts, those of the largest headline KL first."""
    name = question["headline"][0]
    order = sorted(question["by_cluster"], key=lambda row: -number(row[name]))
    lines = [
        {
            "cluster": row["cluster"] + 1,
            "text": shortened(row["text"]),
            "responses": row["responses"],
            "tokens": row["tokens"],
            **{key: Cell(number(row[key])) for key in BOTH},
            "per_response": Cell(number(row.get(f"{name}_per_response")), 3),
            "same": Cell(100 * number(row["same_top_token"]), 1, nats=False),
        }
        for row in order[:MAX_CLUSTERS]
    ]
    sampled = any(f"{name}_per_response" in row for row in order)
    return {"rows": lines, "total": len(order), "sampled": sampled}


def moved(question: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The places that moved most, in four lists, the one of the headline first."""
    names = sorted(MOVED, key=lambda name: name != question["headline"][0])
    return [
        {
            "title": MOVED[name],
            "places": [
                {
                    "where": f"{question['cluster']} {place['cluster'] + 1}, position {place['position']:,}",
                    "before": spelled(place["before"], line=" ↵ "),
                    "token": spelled(place["token"]) or "▫",
                    "after": spelled(place["after"], line=" ↵ "),
                    **{key: Cell(number(place[key]), 3) for key in BOTH},
                    "policy": _side(place, "policy"),
                    "reference": _side(place, "reference"),
                }
                for place in question["most_moved"].get(name, [])
            ],
        }
        for name in names
    ]


def vocabulary(question: Mapping[str, Any]) -> list[tuple[str, list[dict[str, Any]]]]:
    """Tokens of the vocabulary whose probability moved most, up, then down."""
    titles = {"raised": "More probable under the policy", "lowered": "Less probable under the policy"}
    return [
        (
            title,
            [
                {
                    "token": row["token"],
                    "text": spelled(row["text"]) or "▫",
                    "count": row["count"],
                    "change": Cell(number(row["log_ratio_sum"]), 2),
                    "each": Cell(number(row["log_ratio_sum"]) / row["count"], 3),
                }
                for row in question["by_token"].get(name, [])
            ],
        )
        for name, title in titles.items()
    ]


def models(audit: Audit) -> list[dict[str, str]]:
    """What was compared."""
    found = []
    for side in ("policy", "reference"):
        facts: Mapping[str, Any] = audit.summary[side]
        found.append(
            {
                "side": side,
                "source": str(facts["source"]),
                "architecture": str(facts["architecture"]),
                "parameters": count(facts["parameters"]),
                "dtype": str(facts["dtype"]),
                "rows": f"{facts['vocabulary_rows']:,}",
                "context": "–" if facts["context"] is None else f"{facts['context']:,}",
                "fingerprint": str(facts["fingerprint"])[:12],
            }
        )
    return found


def facts(audit: Audit) -> list[tuple[str, str]]:
    """How it was compared: settings, machine, versions."""
    settings, environment = audit.summary["settings"], audit.summary["environment"]
    versions = environment.get("versions") or {}
    git = environment.get("git") or {}
    revision = str(git.get("revision", ""))[:10]
    sampled = any(question["cluster"] == "prompt" for question in audit.questions.values())
    drawn = f"{settings['responses']} a prompt, up to {settings['max_new_tokens']:,} tokens"
    found = {
        "responses": drawn if sampled else "",
        "windows of texts": f"{settings['window']:,} tokens" if settings.get("window") else "",
        "temperature": f"{settings['temperature']:g}",
        "vocabulary": f"{audit.summary['vocabulary']:,} tokens",
        "intervals": f"{100 * settings['confidence']:g}%, {settings['resamples']:,} resamples",
        "seed": str(settings["seed"]),
        "dtype": str(settings["dtype"]),
        "batch": str(settings["batch"]),
        "device": str(environment.get("device_name") or settings["device"]),
        "low memory": "one model at a time" if settings["low_memory"] else "",
        "took": duration(number(audit.summary["seconds"])),
        "started": str(environment.get("started", "")).replace("T", " ").replace("+00:00", " UTC"),
        "versions": " · ".join(f"{name} {version}" for name, version in versions.items()),
        "revision": f"{revision}, changed" if revision and git.get("changed") else revision,
        "command": " ".join(environment.get("command") or []),
    }
    return [(label, value) for label, value in found.items() if value]


def spelled(text: str, line: str = "↵") -> str:
    r"""Write white space that would break a line, or vanish, as signs.

    >>> spelled("a\n\tb")
    'a↵⇥b'
    """
    return text.replace("\r\n", "\n").replace("\n", line).replace("\t", "⇥")


def shortened(text: str) -> str:
    """Cut a text to what a table shows, on one line.

    >>> shortened("a  b"), len(shortened("a" * 1000))
    ('a b', 221)
    """
    words = " ".join(text[: 2 * SHOWN].split())
    return words if len(words) <= SHOWN else f"{words[:SHOWN]}…"


def _row(found: Mapping[str, Any], line: _Line) -> Row:
    value, error, low, high = (
        Cell(line.scale * number(found[key]), line.decimals, line.unit.startswith("nats"))
        for key in ("value", "standard_error", "low", "high")
    )
    return Row(line.title, line.unit, value, error, low, high, line.minor)


def _side(place: Mapping[str, Any], side: str) -> dict[str, Any]:
    log_prob = number(place[f"{side}_log_prob"])
    return {
        "log_prob": Cell(log_prob, 3),
        "probability": f"{figure(100 * math.exp(log_prob), 2)} %",
        "top": spelled(place[f"{side}_top"]) or "▫",
    }
