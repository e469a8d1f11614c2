"""The figures of one size, as they stand on disk."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any

from benchmarks.head.contender import FLOOR, Absent, Contender
from benchmarks.head.inputs import Size
from benchmarks.head.losses import PRODUCTS
from benchmarks.head.memory import Peak
from benchmarks.head.timing import Entrant, ratio


@dataclass
class Row:
    """A contender with its figures."""

    contender: Contender
    seconds: list[float]
    trial: float
    error: float | None
    retired: bool
    peak: Peak | None = None

    @classmethod
    def of(cls, entrant: Entrant) -> Row:
        return cls(entrant.contender, entrant.seconds, entrant.trial, entrant.error, entrant.retired)

    @property
    def median(self) -> float:
        return median(self.seconds) if self.seconds else self.trial


@dataclass
class Result:
    """All rows of a size."""

    size: Size
    element_bytes: int
    rows: list[Row]
    absent: list[Absent]

    def racing(self, task: str, *families: str) -> list[Row]:
        return [
            row
            for row in self.rows
            if row.contender.task == task and row.contender.family in families and not row.retired
        ]

    def fastest(self, task: str, *families: str) -> Row | None:
        return min(self.racing(task, *families), key=lambda row: row.median, default=None)

    def default(self, task: str, family: str) -> Row | None:
        return next((row for row in self.racing(task, family) if row.contender.default), None)

    def floor(self, task: str, *families: str) -> Row | None:
        """Return the fastest bare products of as many products as the task has, of all families or of these."""
        rows = [
            row
            for row in self.rows
            if row.contender.side == FLOOR
            and (not families or row.contender.family in families)
            and not row.retired
            and PRODUCTS[row.contender.task] == PRODUCTS[task]
        ]
        return min(rows, key=lambda row: row.median, default=None)

    def operations(self, task: str) -> int:
        return 2 * PRODUCTS[task] * self.size.rows * self.size.width * self.size.tokens

    def ideal_bytes(self, task: str) -> int:
        """Hidden states and weights read once, the policy's gradients written once, targets read."""
        one = self.element_bytes * self.size.width * (self.size.rows + self.size.tokens)
        return one * (PRODUCTS[task] - 1) + 8 * self.size.rows

    def as_json(self) -> dict[str, Any]:
        return {
            "size": {"N": self.size.rows, "H": self.size.width, "V": self.size.tokens},
            "contenders": [self._row(row) for row in self.rows],
            "absent": [vars(each) for each in self.absent],
        }

    def _row(self, row: Row) -> dict[str, Any]:
        task, floor = row.contender.task, self.floor(row.contender.task)
        quartiles = quantiles(row.seconds, n=4) if len(row.seconds) > 1 else [row.median] * 3
        times_floor = ratio(row.seconds, floor.seconds) if floor and row.seconds else None
        return {
            "name": row.contender.name,
            "task": task,
            "family": row.contender.family,
            "setting": row.contender.setting,
            "side": row.contender.side,
            "settings": row.contender.settings,
            "default": row.contender.default,
            "retired": row.retired,
            "seconds": {
                "median": row.median,
                "quartiles": [quartiles[0], quartiles[2]],
                "trial": row.trial,
                "rounds": row.seconds,
            },
            "times_products": times_floor,
            "teraflops": self.operations(task) / row.median / 1e12,
            "gigabytes_per_second": self.ideal_bytes(task) / row.median / 1e9,
            "gradient_error": row.error,
            "memory": row.peak,
        }
