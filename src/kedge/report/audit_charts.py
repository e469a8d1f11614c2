"""The charts of an audit: how per-token KL is distributed, where its sum comes from, how it goes by position."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import NormalDist
from typing import Any

from kedge.report.audit import BOTH, number, rounded

BINS_PER_DECADE = 6
LOWEST = -9
"""Power of ten of the smallest KL that has a bin of its own; smaller ones are counted in the lowest bin."""


def audit_charts(question: Mapping[str, Any], tokens: Any, confidence: float) -> list[dict[str, Any]]:
    """Collect the charts of a question.

    Args:
        question: Its part of ``measure.json``.
        tokens: Its rows of ``tokens.parquet``.
        confidence: Of the band by position.

    Returns:
        Charts with ``kind`` (``bins``: steps over powers of ten; ``position``), ``title``, ``unit``, ``note`` and
        ``lines``; each line has its ``quantity`` and ``colour``, ``x``, ``y`` and, by position, ``low`` and ``high``.
    """
    return [*_distribution(question, tokens), _position(question, confidence)]


def _distribution(question: Mapping[str, Any], tokens: Any) -> list[dict[str, Any]]:
    """Histograms over the logarithm of the KL: of tokens, of the KL that they carry."""
    shares: list[dict[str, Any]] = []
    parts: list[dict[str, Any]] = []
    for colour, (name, quantity) in enumerate(BOTH.items()):
        counts, sums = _binned(tokens[name])
        mean = number(question["figures"][name]["value"])
        line = {"quantity": quantity, "colour": colour, "mean": rounded(mean)}
        for lines, found in ((shares, counts), (parts, sums)):
            total = math.fsum(found.values())
            if total > 0:
                first, last = min(found), max(found)
                lines.append(
                    {
                        **line,
                        "x": [bin / BINS_PER_DECADE for bin in range(first, last + 2)],
                        "y": [rounded(100 * found.get(bin, 0.0) / total) for bin in range(first, last + 1)],
                    }
                )
    return [
        {
            "kind": "bins",
            "title": "KL of a token",
            "unit": "% of tokens",
            "note": "dotted: the mean",
            "lines": shares,
        },
        {
            "kind": "bins",
            "title": "Where the KL comes from",
            "unit": "% of the sum",
            "note": "",
            "lines": parts,
        },
    ]


def _binned(column: Any) -> tuple[dict[int, float], dict[int, float]]:
    """Count the values and add them up, by the logarithmic bin that they fall into."""
    from pyarrow import compute, float64, table

    values = compute.cast(column, float64())
    above = compute.max_element_wise(values, 10.0**LOWEST)
    bins = compute.floor(compute.multiply(compute.log10(above), BINS_PER_DECADE))
    groups = table({"bin": bins, "value": values}).group_by("bin", use_threads=False)
    counts, sums = {}, {}
    for row in groups.aggregate([("value", "count"), ("value", "sum")]).to_pylist():
        if row["bin"] is not None and math.isfinite(row["bin"]):
            counts[int(row["bin"])] = float(row["value_count"])
            sums[int(row["bin"])] = float(row["value_sum"])
    return counts, sums


def _position(question: Mapping[str, Any], confidence: float) -> dict[str, Any]:
    reach = NormalDist().inv_cdf(0.5 + 0.5 * confidence)
    rows = question["by_position"]
    lines = []
    for colour, (name, quantity) in enumerate(BOTH.items()):
        means = [number(row[name]) for row in rows]
        errors = [reach * number(row[f"{name}_standard_error"]) for row in rows]
        lines.append(
            {
                "quantity": quantity,
                "colour": colour,
                "x": [0.5 * (row["first"] + row["last"]) for row in rows],
                "y": [rounded(mean) for mean in means],
                "low": [rounded(max(0.0, mean - error)) for mean, error in zip(means, errors, strict=True)],
                "high": [rounded(mean + error) for mean, error in zip(means, errors, strict=True)],
            }
        )
    return {
        "kind": "position",
        "title": "KL by position",
        "unit": "nats per token",
        "note": f"± {reach:.2f} s.e.",
        "tokens": [row["tokens"] for row in rows],
        "lines": lines,
    }
