"""What a person sees while a stage runs: a bar on a terminal, one plain line a step elsewhere."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Protocol, runtime_checkable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar


@runtime_checkable
class Progress(Protocol):
    """Something that is told how a run goes."""

    def stage(self, name: str, method: str, start: int, steps: int) -> None:
        """Announce a stage."""

    def step(self, step: int, steps: int, metrics: Mapping[str, float]) -> None:
        """Report a step; step 0 is the start."""

    def say(self, text: str) -> None:
        """Say something worth a line."""

    def close(self) -> None:
        """Stop."""


def progress_for(stream_is_terminal: bool | None = None) -> Progress:
    """Give the bar on a terminal, plain lines otherwise."""
    terminal = sys.stderr.isatty() if stream_is_terminal is None else stream_is_terminal
    return TerminalProgress() if terminal else PlainProgress()


def describe(metrics: Mapping[str, float]) -> str:
    """Give the few figures worth watching, with units.

    >>> describe({"reward/mean": 1.5, "kl/policy_reference/exact": 0.1, "anchor/budget": 0.2, "anchor/beta": 0.3,
    ...     "tokens_per_second": 1234.4})
    'reward 1.500 · KL 0.1000/0.2 nats/token · β 0.300 · 1,234 tokens/s'
    """
    parts = []
    if "cross_entropy/data_policy" in metrics:
        parts.append(f"cross-entropy {metrics['cross_entropy/data_policy']:.4f} nats/token")
    if "preference/accuracy" in metrics:
        parts.append(
            f"loss {metrics.get('loss', math.nan):.4f} · accuracy {metrics['preference/accuracy']:.3f}"
        )
    if "reward/mean" in metrics:
        parts.append(f"reward {metrics['reward/mean']:.3f}")
    if "kl/policy_reference/exact" in metrics:
        parts.append(_kl(metrics))
    if "anchor/beta" in metrics:
        parts.append(f"β {metrics['anchor/beta']:.3g}" if metrics["anchor/beta"] < 0.1 else _beta(metrics))
    parts += _evaluation(metrics)
    if metrics.get("skipped_updates"):
        parts.append(f"{metrics['skipped_updates']:.0f} skipped")
    if "tokens_per_second" in metrics:
        parts.append(f"{metrics['tokens_per_second']:,.0f} tokens/s")
    return " · ".join(parts)


def _kl(metrics: Mapping[str, float]) -> str:
    value, most, unit = metrics["kl/policy_reference/exact"], metrics.get("anchor/budget"), "nats/token"
    if "anchor/budget_per_response" in metrics:
        value, unit = metrics["kl/policy_reference/exact_per_response"], "nats/response"
        most = metrics["anchor/budget_per_response"]
    return f"KL {value:.4f}{f'/{most:g}' if most is not None else ''} {unit}"


def _beta(metrics: Mapping[str, float]) -> str:
    return f"β {metrics['anchor/beta']:.3f}"


def _evaluation(metrics: Mapping[str, float]) -> list[str]:
    parts = []
    if "eval/reward/mean" in metrics:
        error = f" ± {metrics['eval/reward/mean_se']:.3f}" if "eval/reward/mean_se" in metrics else ""
        parts.append(f"held out: reward {metrics['eval/reward/mean']:.3f}{error}")
    if "eval/cross_entropy/data_policy" in metrics:
        parts.append(f"held out: cross-entropy {metrics['eval/cross_entropy/data_policy']:.4f}")
    if "eval/preference/accuracy" in metrics:
        best = metrics.get("eval/preference/accuracy_bayes")
        limit = f" of {best:.3f} at best" if best is not None else ""
        parts.append(f"held out: accuracy {metrics['eval/preference/accuracy']:.3f}{limit}")
    return parts


class PlainProgress:
    """One plain line a step on standard error: no control characters."""

    def __init__(self) -> None:
        self._name = ""
        self._started = 0.0
        self._first = 0

    def stage(self, name: str, method: str, start: int, steps: int) -> None:
        """Announce a stage."""
        self._name, self._started, self._first = name, time.monotonic(), start
        self.say(f"{name}: {method}, {steps} steps" + (f", from step {start}" if start else ""))

    def step(self, step: int, steps: int, metrics: Mapping[str, float]) -> None:
        """Report a step."""
        done = step - self._first
        left = (time.monotonic() - self._started) / done * (steps - step) if done > 0 else None
        clock = f" · {_clock(left)} left" if left is not None else ""
        self.say(f"{self._name} {step}/{steps} · {describe(metrics)}{clock}")

    def say(self, text: str) -> None:
        """Print a line."""
        with suppress(BrokenPipeError):  # nobody listens any more: no reason for a run to end
            print(text, file=sys.stderr, flush=True)  # noqa: T201 (this is where the program speaks)

    def close(self) -> None:
        """Nothing to stop."""


class TerminalProgress:
    """A bar with reward, KL against its budget, β, tokens a second and the time left."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._bar: Bar | None = None
        self._evaluation = ""

    def stage(self, name: str, method: str, start: int, steps: int) -> None:
        """Begin a bar."""
        self.close()
        self._evaluation = ""
        self._bar = Bar(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"),
            console=self._console,
        )
        self._bar.add_task(f"{name} ({method})", total=steps, completed=start, figures="")
        self._bar.start()

    def step(self, step: int, steps: int, metrics: Mapping[str, float]) -> None:
        """Move the bar."""
        if self._bar is None:
            return
        self._evaluation = " · ".join(_evaluation(metrics)) or self._evaluation
        now = describe({name: value for name, value in metrics.items() if not name.startswith("eval/")})
        figures = " · ".join(part for part in (now, self._evaluation) if part)
        self._bar.update(self._bar.task_ids[0], completed=step, figures=figures)

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self._console.print(text, highlight=False, markup=False)

    def close(self) -> None:
        """Leave the finished bar where it is."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
