"""Responses to the same prompts at the first and at the last evaluation, side by side."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from kedge.report.reading import Run

MAX_PROMPTS = 24
MAX_TOKENS = 600

Sample = Mapping[str, Any]
Key = tuple[str, int]


def sample_table(runs: Sequence[Run]) -> dict[str, Any]:
    """Line up responses by prompt.

    Returns:
        ``columns``: for each its ``title``, its ``run``'s index (None for a start that all runs share) and its
        ``step``; ``rows``: for each its ``prompt`` (a list of role and text) and its ``cells``, one a column, None
        where the run has no response; ``left_out``: how many prompts are not shown; ``scale``: the KL in nats at
        which a token is coloured in full.
    """
    policy = [(index, run) for index, run in enumerate(runs) if run.kind == "policy"]
    columns = _columns(policy)
    keys = list(dict.fromkeys(key for _, samples in columns for key in samples))
    rows = [
        {
            "prompt": _messages(json.loads(key[0])),
            "cells": [_cell(samples[key]) if key in samples else None for _, samples in columns],
        }
        for key in keys[:MAX_PROMPTS]
    ]
    return {
        "columns": [column for column, _ in columns],
        "rows": rows,
        "left_out": max(0, len(keys) - MAX_PROMPTS),
        "scale": _scale(rows),
    }


def _columns(runs: Sequence[tuple[int, Run]]) -> list[tuple[dict[str, Any], dict[Key, Sample]]]:
    """Give the columns: where the runs started, once if they agree, then where each of them is now."""
    starts, ends = [], []
    for index, run in runs:
        by_step = _evaluations(run)
        if not by_step:
            continue
        first, last = min(by_step), max(by_step)
        if first != last:
            starts.append(({"title": run.name, "run": index, "step": first}, by_step[first]))
        ends.append(({"title": run.name, "run": index, "step": last}, by_step[last]))
    if len(starts) > 1 and all(_texts(samples) == _texts(starts[0][1]) for _, samples in starts):
        starts = [({"title": "start", "run": None, "step": starts[0][0]["step"]}, starts[0][1])]
    if len(starts) <= 1:
        return [*starts, *ends]
    by_run = {column["run"]: (column, samples) for column, samples in starts}
    return [pair for end in ends for pair in (by_run.get(end[0]["run"]), end) if pair is not None]


def _evaluations(run: Run) -> dict[int, dict[Key, Sample]]:
    """Group a run's evaluation samples by step, then by prompt and how often the prompt came before."""
    found: dict[int, dict[Key, Sample]] = defaultdict(dict)
    seen: dict[tuple[int, str], int] = defaultdict(int)
    for row in run.samples:
        if row.get("kind") == "evaluation":
            step, prompt = int(row["step"]), json.dumps(row.get("prompt"))
            found[step][prompt, seen[step, prompt]] = row
            seen[step, prompt] += 1
    return found


def _texts(samples: Mapping[Key, Sample]) -> dict[Key, Any]:
    return {key: sample.get("completion") for key, sample in samples.items()}


def _messages(prompt: Any) -> list[dict[str, str]]:
    if isinstance(prompt, list):
        return [
            {"role": str(message.get("role", "")), "text": str(message.get("content", ""))}
            for message in prompt
            if isinstance(message, dict)
        ]
    return [{"role": "", "text": str(prompt)}]


def _cell(sample: Sample) -> dict[str, Any]:
    tokens = [str(token) for token in sample.get("tokens") or [sample.get("completion", "")]]
    kl = list(sample.get("kl") or [])
    rewards = {str(name): value for name, value in (sample.get("rewards") or {}).items()}
    return {
        "tokens": tokens[:MAX_TOKENS],
        "gaps": _gaps(tokens[:MAX_TOKENS], str(sample.get("completion", ""))),
        "kl": [_rounded(value) for value in kl[:MAX_TOKENS]],
        "more": max(0, len(tokens) - MAX_TOKENS),
        "total": _rounded(math.fsum(value for value in kl if math.isfinite(value))) if kl else None,
        "reward": sample.get("reward"),
        "rewards": rewards,
        "finished": bool(sample.get("finished", True)),
    }


def _gaps(tokens: Sequence[str], completion: str) -> list[str]:
    """Find the white space before each token that the completion has and the tokens, decoded alone, have not."""
    gaps, place = [], 0
    for token in tokens:
        found = completion.find(token, place)
        gap = completion[place:found] if found >= 0 else ""
        known = found >= 0 and not gap.strip()
        gaps.append(gap if known else "")
        place = found + len(token) if known else place
    return gaps


def _scale(rows: Sequence[Mapping[str, Any]]) -> float:
    """Pick the KL of full colour: what 98 of 100 tokens stay below, but at least 0.5 nats."""
    cells = [cell for row in rows for cell in row["cells"] if cell is not None]
    values = sorted(value for cell in cells for value in cell["kl"] if value is not None)
    high = values[int(0.98 * (len(values) - 1))] if values else 0.0
    return float(f"{max(0.5, high):.2g}")


def _rounded(value: int | float) -> float | None:
    return float(f"{value:.4g}") if math.isfinite(value) else None
