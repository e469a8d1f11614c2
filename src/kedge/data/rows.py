"""Rows of data that know where they come from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

Row: TypeAlias = dict[str, Any]


class Rows(list[Row]):
    """A list of rows, one dict each, with the place of every row for error messages.

    Args:
        rows: column name → value, one dict a row.
        source: file or dataset.
        unit: what the numbers count: "line" for JSONL, else "row".
        numbers: the number of every row in the source; 1, 2, … when left out.

    >>> from kedge.data import Rows
    >>> Rows([{"prompt": "2+2="}], source="sums.jsonl", unit="line").place(0)
    'sums.jsonl, line 1'
    """

    def __init__(
        self,
        rows: Iterable[Row],
        source: str = "the rows given",
        unit: str = "row",
        numbers: Sequence[int] | None = None,
    ) -> None:
        super().__init__(rows)
        self.source = source
        self.unit = unit
        self.numbers = list(range(1, len(self) + 1)) if numbers is None else list(numbers)

    def place(self, index: int) -> str:
        """Say where a row stands in its source."""
        return f"{self.source}, {self.unit} {self.numbers[index]}"

    def with_rows(self, rows: Iterable[Row]) -> Rows:
        """Put other rows in the same places."""
        return Rows(rows, self.source, self.unit, self.numbers)

    def first(self, count: int | None) -> Rows:
        """Take the first ``count`` rows, all when it is None."""
        return Rows(self[:count], self.source, self.unit, self.numbers[:count])
