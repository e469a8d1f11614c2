"""The figure of docs/head.md, from a benchmark's JSON: time and memory over tokens and over the vocabulary.

python -m benchmarks.head.plot benchmarks/results/head-cpu.json docs/images/head-scaling.svg
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from studies.figures import CYCLE, figure

AXES = {"N": "tokens N", "V": "vocabulary V, thousands"}
FIGURES = {"seconds": "seconds", "memory": "incremental peak, GB"}


def curves(scaling: list[dict[str, Any]], along: str, what: str) -> dict[str, list[tuple[float, float]]]:
    """Give the points of each contender, by its name."""
    found: dict[str, list[tuple[float, float]]] = {}
    for point in scaling:
        if point["along"] != along or (what == "memory" and point["peak"] is None):
            continue
        rows, _, tokens = map(int, point["size"].split(","))
        value = point["seconds"] if what == "seconds" else point["peak"]["incremental"] / 1e9
        found.setdefault(point["contender"], []).append((rows if along == "N" else tokens / 1000, value))
    return found


def draw(record: dict[str, Any], path: Path) -> None:
    """Draw time above memory, over N on the left, over V on the right."""
    with figure(path, width=7.6, height=5.2, rows=2, columns=2) as plots:
        for row, (what, label) in enumerate(FIGURES.items()):
            for column, (along, axis) in enumerate(AXES.items()):
                plot = plots[row][column]
                named = curves(record["scaling"], along, what)
                for colour, (name, points) in zip(CYCLE, named.items(), strict=False):
                    plot.plot(*zip(*points, strict=True), "o-", color=colour, ms=4, label=name)
                plot.set(xlabel=axis, ylabel=label, xlim=(0, None), ylim=(0, None))
        plots[0][0].legend(frameon=False)


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:])
    draw(json.loads(source.read_text(encoding="utf-8")), target)
