"""What a person sees while two models are compared: a bar with the time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Protocol, runtime_checkable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

EVERY = 10.0
"""Seconds between two plain lines."""


@runtime_checkable
class Progress(Protocol):
    """Something that is told how a comparison goes."""

    def begin(self, title: str, total: int, unit: str) -> None:
        """Announce a piece of work of so many units."""

    def advance(self, count: int) -> None:
        """Report units done."""

    def close(self) -> None:
        """Stop."""


class Silent:
    """Says nothing."""

    def begin(self, title: str, total: int, unit: str) -> None:
        """Announce nothing."""

    def advance(self, count: int) -> None:
        """Report nothing."""

    def close(self) -> None:
        """Nothing to stop."""


class PlainProgress:
    """A plain line on standard error when a piece of work begins, and every ten seconds."""

    def __init__(self) -> None:
        self._title, self._unit, self._total, self._done = "", "", 0, 0
        self._started = self._spoke = 0.0

    def begin(self, title: str, total: int, unit: str) -> None:
        """Announce a piece of work."""
        self._title, self._unit, self._total, self._done = title, unit, total, 0
        self._started = self._spoke = time.monotonic()
        self._say(f"{title}: {total} {unit}")

    def advance(self, count: int) -> None:
        """Report units done, with the time left."""
        self._done += count
        now = time.monotonic()
        if now - self._spoke < EVERY or self._done >= self._total:
            return
        self._spoke = now
        left = (now - self._started) / self._done * (self._total - self._done)
        minutes, seconds = divmod(round(left), 60)
        self._say(f"{self._title}: {self._done}/{self._total} {self._unit} · {minutes}:{seconds:02d} left")

    def close(self) -> None:
        """Nothing to stop."""

    def _say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)  # noqa: T201 (this is where the program speaks)


class TerminalProgress:
    """A bar for each piece of work."""

    def __init__(self) -> None:
        self._bar: Bar | None = None

    def begin(self, title: str, total: int, unit: str) -> None:
        """Begin a bar."""
        if self._bar is None:
            self._bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[unit]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._bar.start()
        self._bar.add_task(title, total=total, unit=unit)

    def advance(self, count: int) -> None:
        """Move the newest bar."""
        if self._bar is not None:
            self._bar.advance(self._bar.task_ids[-1], count)

    def close(self) -> None:
        """Leave the bars where they are."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def progress_for(stream_is_terminal: bool | None = None) -> Progress:
    """Give bars on a terminal, plain lines otherwise."""
    terminal = sys.stderr.isatty() if stream_is_terminal is None else stream_is_terminal
    return TerminalProgress() if terminal else PlainProgress()
