"""A claim of the certificate, with the verdict on it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
"""Largest error, relative to the largest entry of the truth, by the dtype of hidden states and heads."""

VISIBLE = 1e-3
"""A bias has to be at least this large, relative to the truth, or the certificate could not see it."""


@dataclass(frozen=True)
class Claim:
    """One thing that Kedge says of itself, held against enumeration.

    Args:
        name: What is claimed of: an anchor, a trust region, an output of the head.
        regime: Who drew the tokens, and how many there are.
        what: ``value`` or ``gradient``.
        closed_form: What its expectation is claimed to be.
        exact: Whether that is the truth itself: the value or gradient a user would want, without bias.
        error: Largest deviation from the closed form, relative to the largest entry of the truth.
        tolerance: What the error may be in this dtype.
        distance: ‖closed form − truth‖ / ‖truth‖, the truth being the KL of whole responses (or the policy gradient).
        passed: The error is within the tolerance; and what is claimed exact coincides with the truth, what is
            claimed biased is visibly away from it.
    """

    name: str
    regime: str
    what: str
    closed_form: str
    exact: bool
    error: float
    tolerance: float
    distance: float
    passed: bool


class Measurement(NamedTuple):
    """One draw's evidence for a claim: what Kedge gave in each way it has, the closed form, the truth."""

    offers: Sequence[Tensor]
    form: Tensor
    truth: Tensor


def judge(
    name: str,
    regime: str,
    what: str,
    closed_form: str,
    measurements: Iterable[Measurement],
    *,
    exact: bool,
    dtype: torch.dtype,
) -> Claim:
    """Pass a verdict from several draws: the worst error counts, the mean distance is shown.

    >>> one = torch.ones(1, dtype=torch.float64)
    >>> judge("k3", "on policy", "value", "KL", [Measurement([one], one, one)], exact=True, dtype=one.dtype).passed
    True
    """
    tolerance = TOLERANCE[dtype]
    errors, distances = [], []
    for offers, form, truth in measurements:
        scale = float(truth.abs().max())
        errors += [float((offer - form).abs().nan_to_num(torch.inf).max()) / scale for offer in offers]
        distances.append(float((form - truth).norm() / truth.norm()))
    placed = max(distances) <= TOLERANCE[torch.float64] if exact else min(distances) >= VISIBLE
    return Claim(
        name=name,
        regime=regime,
        what=what,
        closed_form=closed_form,
        exact=exact,
        error=max(errors),
        tolerance=tolerance,
        distance=sum(distances) / len(distances),
        passed=placed and max(errors) <= tolerance,
    )


def print_table(claims: Sequence[Claim], console: Console | None = None) -> None:
    """Print the certificate: a row for each claim, then how many hold.

    Args:
        claims: What `run` returned.
        console: Where to; standard output by default.
    """
    console = console or Console()
    table = Table(title="Values and expected gradients against enumeration", title_justify="left")
    for heading in ("", "what", "expectation", "error", "bias", ""):
        table.add_column(heading, justify="right" if heading in ("error", "bias") else "left")
    regime = None
    for claim in claims:
        if claim.regime != regime:
            regime = claim.regime
            table.add_section()
            table.add_row(Text(regime, style="bold"))
        bias = "none" if claim.exact else f"{claim.distance:.2f}"
        verdict = Text("holds", style="green") if claim.passed else Text("FAILS", style="bold red")
        row = (claim.name, claim.what, claim.closed_form, f"{claim.error:.0e}", bias)
        table.add_row(*map(Text, row), verdict)
    console.print(table)
    failed = [claim for claim in claims if not claim.passed]
    console.print(
        f"{len(claims) - len(failed)} of {len(claims)} claims hold; errors are relative, at most "
        f"{max((claim.tolerance for claim in claims), default=0.0):.0e} allowed. Bias: distance of the expectation "
        "from the KL (or policy gradient) of whole responses.",
        highlight=False,
    )
