"""Claims on every anchor that has a formula, refused ones too."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from kedge.certify.claims import Claim, Measurement, judge
from kedge.certify.forms import Form, gradient_form, value_form
from kedge.certify.offered import Offer, anchored, enumerate_groups
from kedge.certify.tabular import Tabular
from kedge.certify.truth import Truth
from kedge.objective import Anchor
from kedge.objective.anchor import undefined


class Regime(NamedTuple):
    """Who draws the tokens, and how many there are to a response."""

    name: str
    off_policy: bool
    length: int


REGIMES = (
    Regime("anchor, one token, on policy", False, 1),
    Regime("anchor, on policy", False, 3),
    Regime("anchor, off policy", True, 3),
)


def expressible() -> list[Anchor]:
    """List every anchor that has a formula.

    >>> len(expressible())
    50
    """
    every = itertools.product(
        ("loss", "reward"),
        ("exact", "k1", "k2", "k3"),
        ("reverse", "forward"),
        ("published", "token", "sequence"),
        ("none", "prefix"),
        (False, True),
    )
    anchors = (
        Anchor(measure, direction, placement, gradient, weights, baseline)  # type: ignore[arg-type]
        for placement, measure, direction, gradient, weights, baseline in every
    )
    return [anchor for anchor in anchors if undefined(anchor) is None]


def describe(anchor: Anchor) -> str:
    """Name an anchor in a few words.

    >>> describe(Anchor("exact", gradient="sequence", weights="prefix"))
    'exact in loss, sequence, prefix weights'
    """
    words = [f"{anchor.measure} in {anchor.placement}", anchor.gradient]
    if anchor.direction == "forward":
        words[0] = f"forward {words[0]}"
    if anchor.weights == "prefix":
        words.append("prefix weights")
    if anchor.baseline:
        words.append("baseline")
    return ", ".join(words)


def anchor_claims(
    draws: dict[int, list[Tabular]], device: torch.device, dtype: torch.dtype
) -> Iterator[Claim]:
    """Claim what each anchor gives in each regime.

    Args:
        draws: Tabular problems by the length of their responses.
        device: Where Kedge's functions run.
        dtype: Of hidden states and heads.
    """
    for regime in REGIMES:
        for anchor in expressible():
            if regime.length > 1 or (anchor.weights == "none" and not anchor.baseline):
                yield from claims_on(anchor, regime, draws[regime.length], device, dtype)


def claims_on(
    anchor: Anchor, regime: Regime, problems: list[Tabular], device: torch.device, dtype: torch.dtype
) -> Iterator[Claim]:
    """Claim an anchor's expected gradient, and its value where it is part of the loss.

    Responses come in groups of two where the anchor compares them, else one by one.
    """
    compares = anchor.baseline or (anchor.placement == "reward" and anchor.gradient == "published")
    size = 2 if compares else 1
    truths = [Truth(problem, regime.off_policy) for problem in problems]
    wanted = [truth.sequence_kl(anchor.direction) for truth in truths]
    offers = [
        anchored(
            enumerate_groups(problem, device, dtype, off_policy=regime.off_policy, size=size),
            anchor,
            off_policy=regime.off_policy,
        )
        for problem in problems
    ]
    name = describe(anchor)
    forms = [gradient_form(truth, anchor) for truth in truths]
    slopes = [truth.gradient(kl) for truth, kl in zip(truths, wanted, strict=True)]
    evidence = _evidence(offers, "gradient", forms, slopes)
    yield judge(name, regime.name, "gradient", forms[0].text, evidence, exact=forms[0].exact, dtype=dtype)
    if anchor.placement == "loss" and not anchor.baseline:
        forms = [value_form(truth, anchor) for truth in truths]
        evidence = _evidence(offers, "value", forms, [kl.detach() for kl in wanted])
        yield judge(name, regime.name, "value", forms[0].text, evidence, exact=forms[0].exact, dtype=dtype)


def _evidence(
    offers: list[dict[str, Offer]], what: str, forms: list[Form], truths: list[Tensor]
) -> list[Measurement]:
    return [
        Measurement([getattr(offer, what) for offer in ways.values()], form.value, truth)
        for ways, form, truth in zip(offers, forms, truths, strict=True)
    ]
