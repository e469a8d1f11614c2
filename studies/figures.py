"""The look of the docs' figures."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")

TARGET, FORWARD, REVERSE = "#d9dde3", "#c2571a", "#1f5fa8"
CYCLE = ("#1f5fa8", "#c2571a", "#3b7d4f", "#8a4fa3", "#7a7f87", "#b3923a")
STYLE: Any = {  # matplotlib types its keys one by one
    "font.size": 9,
    "font.family": "DejaVu Sans",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#7a7f87",
    "axes.grid": True,
    "grid.color": "#eceff2",
    "axes.axisbelow": True,
    "lines.linewidth": 1.6,
    "svg.hashsalt": "kedge",  # equal data, equal file
    "figure.facecolor": "white",
}


@contextmanager
def figure(path: Path, *, width: float, height: float, rows: int = 1, columns: int = 1) -> Iterator[Any]:
    """Give axes to draw in; save them as SVG, without a date."""
    from matplotlib import pyplot

    with pyplot.rc_context(STYLE):
        drawn, axes = pyplot.subplots(rows, columns, figsize=(width, height), layout="constrained")
        yield axes
        path.parent.mkdir(parents=True, exist_ok=True)
        drawn.savefig(path, metadata={"Date": None})
        pyplot.close(drawn)
