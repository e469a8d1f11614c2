"""Ctrl-C and SIGTERM: finish the update at hand, save, stop."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from kedge.errors import RunError


class Interrupted(RunError):
    """The user or the system asked the run to stop; it was saved."""


class Interrupt:
    """While entered, the first SIGINT or SIGTERM only sets a flag; a second SIGINT stops at once."""

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True

    def check(self) -> None:
        """Raise ``Interrupted`` if a stop was asked for."""
        if self.requested:
            raise Interrupted("stopped as asked; the run is saved, go on with resume=true")
