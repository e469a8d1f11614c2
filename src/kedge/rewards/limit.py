"""Calls with a time limit."""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Callable
from typing import Any

GRACE = 1.0
"""Seconds that an interrupted call gets to end."""


class TimedOut(Exception):
    """A call did not end in time; ``ended`` tells whether it could be interrupted."""

    def __init__(self, ended: bool) -> None:
        super().__init__("timed out")
        self.ended = ended


class _Interrupt(BaseException):
    """Thrown into a call that is late; no Exception, so that ``except Exception`` does not catch it."""


def call(function: Callable[[], Any], seconds: float | None) -> Any:
    """Call a function and wait for it, but not longer than a limit.

    With a limit the function runs in a daemon thread, which cannot keep the process alive. When it is
    late an exception is thrown into it: that ends Python code at its next instruction, but not a call
    that waits outside Python.

    Args:
        function: called without arguments.
        seconds: the limit; None runs it here, without one.

    Returns:
        What it returned.

    Raises:
        TimedOut: it was late.

    >>> from kedge.rewards.limit import call
    >>> call(lambda: 1 + 1, seconds=5.0)
    2
    """
    if seconds is None:
        return function()
    outcome: dict[str, Any] = {}

    def run() -> None:
        with contextlib.suppress(_Interrupt):
            try:
                outcome["value"] = function()
            except _Interrupt:
                raise
            except BaseException as error:  # noqa: BLE001  (raised again in the caller's thread)
                outcome["error"] = error

    thread = threading.Thread(target=run, name="kedge-reward", daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        ctypes.pythonapi.PyThreadState_SetAsyncExc(
            ctypes.c_ulong(thread.ident or 0), ctypes.py_object(_Interrupt)
        )
        thread.join(GRACE)
        raise TimedOut(ended=not thread.is_alive())
    if "error" in outcome:
        raise outcome["error"]
    return outcome["value"]
