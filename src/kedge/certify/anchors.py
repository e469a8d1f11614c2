"""Claims on every anchor that has a formula, refused ones too."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from kedge.certify.claims import Claim, Measurement, judge
from kedge.certify.forms import gradient_form, value_form
from kedge.certify.offered import Experience, Offer, anchored, enumerate_groups
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
    """Claim the expected gradient of each anchor in each regime, and its value where it is part of the loss.

    Responses come in groups of two where the anchor compares them, else one by one.

    Args:
        draws: Tabular problems by the length of their responses.
        device: Where Kedge's functions run.
        dtype: Of hidden states and heads.
    """
    for regime in REGIMES:
        cases = {
            size: [
                (each, enumerate_groups(each, device, dtype, off_policy=regime.off_policy, size=size))
                for each in draws[regime.length]
            ]
            for size in (1, 2)
        }
        for anchor in expressible():
            if regime.length == 1 and (anchor.weights != "none" or anchor.baseline):
                continue
            compared = anchor.baseline or (anchor.placement == "reward" and anchor.gradient == "published")
            yield from _claims(anchor, regime, cases[2 if compared else 1], dtype)


def _claims(
    anchor: Anchor, regime: Regime, cases: list[tuple[Tabular, Experience]], dtype: torch.dtype
) -> Iterator[Claim]:
    truths = [Truth(problem, regime.off_policy) for problem, _ in cases]
    offers = [anchored(experience, anchor, off_policy=regime.off_policy) for _, experience in cases]
    forms = [gradient_form(truth, anchor) for truth in truths]
    wanted = [truth.gradient(truth.sequence_kl(anchor.direction)) for truth in truths]
    yield judge(
        describe(anchor),
        regime.name,
        "gradient",
        forms[0].text,
        [
            Measurement(_pick(offer, "gradient"), form.value, true)
            for offer, form, true in zip(offers, forms, wanted, strict=True)
        ],
        exact=forms[0].exact,
        dtype=dtype,
    )
    if anchor.placement == "reward" or anchor.baseline:
        return
    forms = [value_form(truth, anchor) for truth in truths]
    values = [truth.sequence_kl(anchor.direction).detach() for truth in truths]
    yield judge(
        describe(anchor),
        regime.name,
        "value",
        forms[0].text,
        [
            Measurement(_pick(offer, "value"), form.value, true)
            for offer, form, true in zip(offers, forms, values, strict=True)
        ],
        exact=forms[0].exact,
        dtype=dtype,
    )


def _pick(offers: dict[str, Offer], what: str) -> list[Tensor]:
    return [getattr(offer, what) for offer in offers.values()]
