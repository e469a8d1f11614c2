"""The page about runs: what ran, the last evaluations, charts, samples."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kedge.report import description, document
from kedge.report.charts import sections
from kedge.report.comparison import comparison
from kedge.report.reading import Run, read_runs
from kedge.report.samples import sample_table

SCRIPTS = (
    "vendor/uplot/uPlot.iife.min.js",
    "assets/format.js",
    "assets/state.js",
    "assets/axes.js",
    "assets/charts.js",
    "assets/frontier.js",
    "assets/tokens.js",
    "assets/samples.js",
    "assets/controls.js",
    "assets/page.js",
)
STYLES = (
    "vendor/uplot/uPlot.min.css",
    "assets/report.css",
    "assets/charts.css",
    "assets/tokens.css",
    "assets/samples.css",
)


def write_report(runs: Sequence[Path], out: Path) -> Path:
    """Write a page about some runs that opens offline.

    It shows what ran, the comparison of the last evaluations, charts of rewards, KL against its budget, β,
    entropy, clip fractions and lengths, and responses before and after with every token's KL. Runs may still be
    in progress and metrics may be missing: what is there is shown.

    Args:
        runs: Run directories, or folders of run directories.
        out: The file to write, or a folder for ``report.html``.

    Returns:
        The file written.

    Raises:
        UserError: A path is no run directory, or a file in it is damaged.
        RunError: The file could not be written.

    >>> import tempfile
    >>> from kedge.runs import RunDirectory
    >>> run = RunDirectory.create(Path(tempfile.mkdtemp()) / "run", {"method": "grpo"}, resume=False)
    >>> run.metrics({"step": 1, "reward/mean": 0.5})
    >>> write_report([run.path], run.path).name
    'report.html'
    """
    file = out / "report.html" if out.is_dir() else out
    return document.write_page(file, render(read_runs(runs)), "kedge report")


def render(runs: Sequence[Run]) -> str:
    """Render the page about runs that were read."""
    names = [run.name for run in runs]
    folders = {run.path.parent for run in runs}
    data = {
        "runs": [{"name": name, "kind": run.kind} for name, run in zip(names, runs, strict=True)],
        "sections": sections(runs),
        "samples": sample_table(runs),
    }
    return document.render(
        "report.html",
        SCRIPTS,
        STYLES,
        data,
        title=folders.pop().name if len(runs) > 1 and len(folders) == 1 else " · ".join(names),
        runs=description.lines(runs),
        facts=description.facts(runs),
        table=comparison(runs),
        colours=names,
    )
