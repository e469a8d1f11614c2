"""The head's errors on the screen, beside what they may be."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from rich.console import Console
from rich.table import Table
from rich.text import Text

from kedge.certify.accuracy import WORST, Accuracy

HEADINGS = (
    "drift", "", "value", "worst", "limit", "∇h", "worst", "∇W", "limit", "value", "∇h", "",
)  # fmt: skip
"""The last two figures are those of logits that were rounded to bfloat16."""


def print_accuracy(found: Sequence[Accuracy], console: Console | None = None) -> None:
    """Print a table for each setting, with a row for each output and drift, then how many hold.

    Args:
        found: What `head_accuracy` gave.
        console: Where to; standard output by default.
    """
    console = console or Console()
    for setting, rows in groupby(found, _setting):
        table = Table(title=Text(setting, style="bold"), title_justify="left", box=None, padding=(0, 1, 0, 0))
        for index, heading in enumerate(HEADINGS):
            table.add_column(heading, justify="right" if index not in (1, 11) else "left", no_wrap=True)
        for each in rows:
            _add(table, each)
        console.print(table)
        console.print()
    passed = sum(each.passed for each in found)
    console.print(
        f"{passed} of {len(found)} hold. ∇h, ∇W: gradients of hidden states and weight. Values of log_prob and "
        "entropy are off by so many nats, all else by so much of the truth: median over rows, then the worst row. "
        f"The limit is the median's; the worst row and ∇W have {WORST} times as much. Last two figures: what float32 "
        "arithmetic makes of logits that were rounded to bfloat16.",
        highlight=False,
    )


def _setting(each: Accuracy) -> str:
    dtype = str(each.dtype).removeprefix("torch.")
    return f"{each.backend or 'default'} backend, vocabulary {each.tokens:,}, {each.shape}, {dtype} inputs"


def _add(table: Table, each: Accuracy) -> None:
    right, wrong = each.found, each.rounded
    figures = (
        right.value, right.worst_value, each.limit,
        right.hidden, right.worst_hidden, right.weight, each.gradient_limit,
        wrong.value, wrong.hidden,
    )  # fmt: skip
    verdict = Text("holds", style="green") if each.passed else Text("FAILS", style="bold red")
    name = each.output.removeprefix("reference.")
    table.add_row(f"{each.drift:g}", name, *(f"{figure:.0e}" for figure in figures), verdict)
