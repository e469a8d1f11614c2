"""What people read: a table for each task, the sweeps, the goals."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from benchmarks.head.contender import FLOOR
from benchmarks.head.goals import Goal
from benchmarks.head.losses import PRODUCTS, TASKS
from benchmarks.head.results import Result, Row
from benchmarks.head.scaling import Point
from benchmarks.head.timing import ratio

STYLES = {"pass": "green", "fall short": "bold red", "not checked": "yellow", "for information": "dim"}


def show_result(console: Console, result: Result) -> None:
    for task in TASKS:
        floor = result.floor(task)
        rows = [row for row in result.rows if row.contender.task == task]
        if floor and floor not in rows:
            rows.insert(0, floor)
        table = Table(title=f"{task}, N,H,V = {result.size}, forward + backward", title_justify="left")
        for name in ("contender", "setting"):
            table.add_column(name, overflow="fold")
        numbers = ("median", "quartiles", "× products", "TF/s", "GB/s", "memory +MB", "peak MB", "error")
        for name in numbers:
            table.add_column(name, justify="right")
        for row in sorted(rows, key=lambda row: row.median):
            table.add_row(*_cells(result, task, row, floor), style="bold" if row.contender.default else None)
        for absent in result.absent:
            if absent.task == task:
                table.add_row(absent.family, f"absent: {absent.reason}", style="dim")
        console.print(table)
    console.print(
        f"TF/s count the {', '.join(f'{PRODUCTS[task]} products ({task})' for task in TASKS)} of 2·N·H·V that a task "
        "needs, whoever does more; GB/s inputs read once and gradients written once. Bold: the setting that users "
        "get. ~: one run, slower than another setting of its family, out of the rounds.\n",
        style="dim",
    )


def _cells(result: Result, task: str, row: Row, floor: Row | None) -> list[str]:
    each = row.contender
    start = [each.family, each.setting]
    rates = [
        f"{result.operations(task) / row.median / 1e12:.3f}",
        f"{result.ideal_bytes(task) / row.median / 1e9:.2f}",
    ]
    if row.retired:
        return [*start, f"~{_time(row.median)}", "", "", *rates, "", "", ""]
    seconds = sorted(row.seconds)
    spread = f"{_time(seconds[len(seconds) // 4])}–{_time(seconds[-len(seconds) // 4])}"
    times = f"{ratio(row.seconds, floor.seconds):.2f}" if floor else ""
    memory = [f"{row.peak[key] / 1e6:.0f}" for key in ("incremental", "absolute")] if row.peak else ["", ""]
    error = "" if each.side == FLOOR or row.error is None else f"{row.error:.0e}"
    return [*start, _time(row.median), spread, times, *rates, *memory, error]


def show_sweeps(console: Console, points: list[Point]) -> None:
    if not points:
        return
    table = Table(title="exact KL + entropy over tokens and vocabulary", title_justify="left")
    for name in ("contender", "over", "N,H,V"):
        table.add_column(name)
    for name in ("median", "ns a logit", "memory +MB"):
        table.add_column(name, justify="right")
    for point in sorted(points, key=lambda point: (point.along, point.contender)):
        per_logit = point.seconds / point.size.rows / point.size.tokens * 1e9
        memory = f"{point.peak['incremental'] / 1e6:.0f}" if point.peak else ""
        cells = (_time(point.seconds), f"{per_logit:.2f}", memory)
        table.add_row(point.contender, point.along, str(point.size), *cells)
    console.print(table)


def show_goals(console: Console, goals: list[Goal]) -> None:
    table = Table(title="goals", title_justify="left")
    for name in ("goal", "size", "what"):
        table.add_column(name, overflow="fold")
    for name in ("figure", "at most"):
        table.add_column(name, justify="right")
    table.add_column("verdict")
    for goal in goals:
        table.add_row(
            goal.name,
            goal.where,
            goal.what,
            "" if goal.figure is None else f"{goal.figure:.3f}",
            "" if goal.limit is None else f"{goal.limit:g}",
            f"[{STYLES[goal.verdict]}]{goal.verdict}[/]",
        )
    console.print(table)


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"
