"""The last evaluations of several runs in one table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from kedge.report.numbers import figure
from kedge.report.reading import Metrics, Run, read_runs


@dataclass(frozen=True)
class Column:
    """A metric of the table: its name, a title, its unit, how it is scaled, how many decimals it is shown with."""

    metric: str
    title: str
    unit: str = ""
    decimals: int = 3
    scale: float = 1.0


@dataclass(frozen=True)
class Row:
    """One evaluation: the run's name, the step, and the value and standard error of each metric."""

    run: str
    step: int
    values: dict[str, float]
    errors: dict[str, float] = field(default_factory=dict)

    def text(self, column: Column, *, errors: bool = True) -> str:
        """Write a cell: the value, ± its standard error where there is one."""
        value = figure(_scaled(self.values, column), column.decimals)
        error = _scaled(self.errors, column)
        return f"{value} ± {figure(error, column.decimals)}" if errors and not math.isnan(error) else value


@dataclass(frozen=True)
class Comparison:
    """A table: its columns and its rows, of one kind of run."""

    columns: list[Column]
    rows: list[Row]

    def table(self, *, turned: bool = False, errors: bool = True) -> Table:
        """Lay it out for a terminal: a line for each run or, turned, for each metric."""
        cells = [
            [Text(row.run), Text(str(row.step)), *(Text(row.text(c, errors=errors)) for c in self.columns)]
            for row in self.rows
        ]
        if turned:
            titles = [Text("run"), Text("step")]
            titles += [Text(f"{column.title}, {column.unit}".strip(", ")) for column in self.columns]
            cells = [list(line) for line in zip(titles, *cells, strict=True)]
            return _table(cells[0], cells[1:])
        titles = [Text("\nrun"), Text("\nstep")]
        titles += [Text(f"{column.title}\n{column.unit}") for column in self.columns]
        return _table(titles, cells)


_AFTER_REWARDS = (
    Column("kl/policy_reference/exact", "KL", "nats/token", 4),
    Column("kl/policy_reference/exact_per_response", "KL", "nats/response", 2),
    Column("entropy/policy", "entropy", "nats/token"),
    Column("perplexity/reference", "perplexity", "under reference", 2),
    Column("length/mean", "length", "tokens", 1),
    Column("length/truncated_fraction", "cut off", "%", 1, 100.0),
)
_SFT = (
    Column("cross_entropy/data_policy", "cross-entropy", "nats/token", 4),
    Column("entropy/data", "H(data)", "nats/token", 4),
    Column("kl/data_policy", "KL(data‖policy)", "nats/token", 4),
    Column("entropy/policy", "entropy", "nats/token", 4),
    Column("perplexity/policy", "perplexity", "", 3),
)
_REWARD_MODEL = (
    Column("preference/accuracy", "accuracy", "share"),
    Column("preference/accuracy_bayes", "accuracy", "at best"),
    Column("preference/cross_entropy", "cross-entropy", "nats/pair", 4),
    Column("preference/cross_entropy_bayes", "cross-entropy", "at best", 4),
    Column("preference/brier_score", "Brier score", "", 4),
    Column("preference/calibration_error", "calibration error", "", 4),
    Column("preference/margin_mean", "margin", "mean"),
)

_LAYOUTS = ((False, True), (True, True), (False, False), (True, False))
"""Turned, with standard errors: the first layout that fits the terminal is taken."""


def comparison(runs: Sequence[Path] | Sequence[Run]) -> Comparison:
    """Compare the last evaluations of policy runs, above them where they started.

    Each run has a row; runs that started from the same model, with the same first evaluation, share one row for
    it. Columns are every ``eval/reward/<name>``, KL per token and per response, entropy, perplexity of the
    responses under the reference, length, share cut by the length limit; what no run has is left out. Where there
    are no policy runs: cross-entropy, entropies, KL and perplexity of supervised runs, accuracy and calibration of
    reward models.

    Args:
        runs: Run directories, folders of run directories, or runs read before.

    Raises:
        UserError: A path is no run directory.

    >>> run = Run("mine", Path("mine"), {"method": "grpo"}, {}, [{"step": 9, "eval/reward/gold": 0.75}], [])
    >>> table = comparison([run])
    >>> table.rows[0].run, table.rows[0].text(table.columns[0])
    ('mine', '0.750')
    """
    found = [run for run in runs if isinstance(run, Run)] or read_runs([Path(str(path)) for path in runs])
    policy = [run for run in found if run.kind == "policy"]
    return _policy_comparison(policy) if policy else _data_comparison(found)


def print_comparison(runs: Sequence[Path], console: Console | None = None) -> None:
    """Print ``comparison(runs)``, turned or without standard errors where the terminal is too narrow.

    Args:
        runs: Run directories, or folders of run directories.
        console: Where to print; standard output when left out.
    """
    console = console or Console()
    found = comparison(runs)
    tables = [found.table(turned=turned, errors=errors) for turned, errors in _LAYOUTS]
    unbounded = console.options.update(width=10_000)
    widths = [Measurement.get(console, unbounded, table).maximum for table in tables]
    fitting = [table for table, width in zip(tables, widths, strict=True) if width <= console.width]
    console.print(fitting[0] if fitting else tables[-1])


def reward_columns(runs: Sequence[Run]) -> list[Column]:
    """One column for each named reward, or for the mean alone where none has a name."""
    names = list(dict.fromkeys(name for run in runs for name in run.rewards))
    shown = [Column(f"reward/{name}", "reward", name) for name in names]
    return shown or [Column("reward/mean", "reward", "mean")]


def _policy_comparison(runs: Sequence[Run]) -> Comparison:
    columns = [*reward_columns(runs), *_AFTER_REWARDS]
    return _with_values(columns, [*_starts(runs, columns), *(_last(run, columns) for run in runs)])


def _data_comparison(runs: Sequence[Run]) -> Comparison:
    columns = [*_SFT, *_REWARD_MODEL]
    return _with_values(columns, [_last(run, columns) for run in runs])


def _with_values(columns: Sequence[Column], rows: list[Row]) -> Comparison:
    used = [column for column in columns if any(not math.isnan(row.values[column.metric]) for row in rows)]
    return Comparison(used, rows)


def _starts(runs: Sequence[Run], columns: Sequence[Column]) -> list[Row]:
    """Rows of the evaluations before the first step, one for all runs that share it."""
    groups: dict[tuple[str, ...], tuple[Row, list[str]]] = {}
    for run in runs:
        if len(run.evaluations) > 1 and run.evaluations[0]["step"] == 0:
            row = _row(run.name, run.evaluations[0], columns)
            shown = tuple(row.text(column) for column in columns)
            groups.setdefault(shown, (row, []))[1].append(run.name)
    return [
        Row("start" if len(groups) == 1 else f"start of {', '.join(names)}", 0, row.values, row.errors)
        for row, names in groups.values()
    ]


def _last(run: Run, columns: Sequence[Column]) -> Row:
    if not run.evaluations:
        return Row(run.name, run.step, {column.metric: math.nan for column in columns})
    return _row(run.name, run.evaluations[-1], columns)


def _row(name: str, evaluation: Metrics, columns: Sequence[Column]) -> Row:
    values = {column.metric: float(evaluation.get(column.metric, math.nan)) for column in columns}
    errors = {
        column.metric: float(evaluation[f"{column.metric}_se"])
        for column in columns
        if f"{column.metric}_se" in evaluation
    }
    return Row(name, int(evaluation["step"]), values, errors)


def _table(head: Sequence[Text], lines: Sequence[Sequence[Text]]) -> Table:
    table = Table(box=SIMPLE_HEAD, header_style="bold", pad_edge=False)
    for index, title in enumerate(head):
        table.add_column(title, justify="right" if index else "left", no_wrap=True)
    for line in lines:
        table.add_row(*line)
    return table


def _scaled(values: dict[str, float], column: Column) -> float:
    return values.get(column.metric, math.nan) * column.scale
