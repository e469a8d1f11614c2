"""How far the head is from float64 where it is hardest: a reference that is close, a vocabulary of real size."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from kedge.certify.near import FLAT, PEAKED, Near, Shape, draw_near
from kedge.certify.whole import DEFINITIONS, Result, whole_results
from kedge.head import Head, score

DRIFTS = (0.1, 0.01, 0.001)
VOCABULARIES = (50_257, 151_936)
DTYPES = (torch.float32, torch.bfloat16)
RETURNED = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}
"""Unit roundoff of a dtype: what returning a gradient in it costs."""

WORST = 8
"""The worst row, and the weight's gradient, may be as many times as far off as the median row."""


@dataclass(frozen=True)
class Errors:
    """What a way of computing an output is off by.

    Args:
        value: Median over rows: nats for log_prob and entropy, relative for a KL.
        worst_value: The same of the worst row; a row's truth counts as the mean of all at least.
        hidden: Gradient of a row's hidden state: ‖error‖ / ‖truth‖, median over rows.
        worst_hidden: The same of the worst row; a row's ‖truth‖ counts as the mean of all at least.
        weight: Gradient of the weight: ‖error‖ / ‖truth‖.
    """

    value: float
    worst_value: float
    hidden: float
    worst_hidden: float
    weight: float


@dataclass(frozen=True)
class Accuracy:
    """An output's errors in one setting, with what they may be.

    What is left of float32 is the rounding of the products: u·L in a logit, u being 2⁻²⁴ and L the largest. A KL
    compares logits that differ by the drift, so that the same rounding is u·L/drift of it. ``limit`` is eight times
    that. A gradient is also rounded once to the dtype in which it is returned; the inputs' dtype changes nothing else.

    Args:
        backend: Which way of the head; None: the one that callers get who name none.
        tokens: Entries of the vocabulary.
        shape: ``flat`` or ``peaked``.
        drift: Standard deviation of the difference between the logits of policy and reference.
        dtype: Of hidden states and heads.
        output: Of the head.
        found: The head's errors.
        rounded: Those of float32 arithmetic on logits that were rounded to bfloat16.
        limit: What the median error of a value may be.
    """

    backend: str | None
    tokens: int
    shape: str
    drift: float
    dtype: torch.dtype
    output: str
    found: Errors
    rounded: Errors
    limit: float

    @property
    def gradient_limit(self) -> float:
        """What the median error of a gradient may be."""
        return self.limit + RETURNED[self.dtype]

    @property
    def passed(self) -> bool:
        """Whether every error is within its bound."""
        return self.holds(self.found)

    def holds(self, errors: Errors) -> bool:
        """Whether these errors would be within the bounds."""
        worst = WORST * self.limit
        return (
            errors.value <= self.limit
            and errors.worst_value <= worst
            and errors.hidden <= self.gradient_limit
            and max(errors.worst_hidden, errors.weight) <= worst + RETURNED[self.dtype]
        )


def head_accuracy(
    device: str | torch.device = "cpu",
    backends: Sequence[str | None] = (None,),
    dtypes: Sequence[torch.dtype] = DTYPES,
    vocabularies: Sequence[int] = VOCABULARIES,
    drifts: Sequence[float] = DRIFTS,
) -> Iterator[Accuracy]:
    """Hold the head's values and gradients against float64, setting by setting.

    The truth is the definition in float64, on the CPU, of the very numbers that the head is given.

    Args:
        device: Where the head runs.
        backends: Which ways of it; None: the one that callers get who name none.
        dtypes: Of hidden states and heads: float32, bfloat16.
        vocabularies: Entries of the vocabulary.
        drifts: Standard deviations of the difference between the logits of policy and reference.

    Raises:
        ValueError: for an unknown backend.

    >>> found = list(head_accuracy(vocabularies=[300], drifts=[0.1]))
    >>> len(found), all(each.passed for each in found)
    (16, True)
    """
    settings = itertools.product(vocabularies, (FLAT, PEAKED), dtypes, drifts)
    for tokens, shape, dtype, drift in settings:
        near = draw_near(tokens, shape, drift, dtype)
        truth = whole_results(near, torch.float64)
        rounded = _errors(whole_results(near, torch.float32, rounded=True), truth)
        for backend in backends:
            found = _errors(head_results(near, torch.device(device), backend), truth)
            for output in DEFINITIONS:
                yield Accuracy(
                    backend, tokens, shape.name, drift, dtype, output, found[output], rounded[output],
                    limit=_limit(shape, drift, output),
                )  # fmt: skip


def head_results(near: Near, device: torch.device, backend: str | None) -> dict[str, Result]:
    """Return every output of the table with its gradients, as `kedge.head.score` gives them."""
    hidden = near.hidden.to(device).requires_grad_()
    weight = near.weight.to(device).requires_grad_()
    scores = score(
        hidden,
        Head(weight),
        near.targets.to(device),
        anchors={"reference": (near.reference.to(device), Head(near.reference_weight.to(device)))},
        want=tuple(DEFINITIONS),
        **({} if backend is None else {"backend": backend}),  # type: ignore[arg-type]
    )
    return {
        output: Result(
            scores[output].detach(),
            *torch.autograd.grad(scores[output].sum(), (hidden, weight), retain_graph=True),
        )
        for output in DEFINITIONS
    }


def _limit(shape: Shape, drift: float, output: str) -> float:
    rounding = 8 * RETURNED[torch.float32] * shape.largest
    return rounding / drift if output.endswith("kl") else rounding


def _errors(found: dict[str, Result], truth: dict[str, Result]) -> dict[str, Errors]:
    return {output: _compare(output, found[output], true) for output, true in truth.items()}


def _compare(output: str, found: Result, truth: Result) -> Errors:
    value, hidden, weight = (
        (each.cpu().double() - true).nan_to_num(torch.inf) for each, true in zip(found, truth, strict=True)
    )
    values = value.abs(), truth.value if output.endswith("kl") else torch.ones_like(truth.value)
    rows = hidden.norm(dim=-1), truth.hidden.norm(dim=-1)
    return Errors(
        value=_median(*values),
        worst_value=_worst(*values),
        hidden=_median(*rows),
        worst_hidden=_worst(*rows),
        weight=float(weight.norm() / truth.weight.norm()),
    )


def _median(errors: Float[Tensor, " N"], truths: Float[Tensor, " N"]) -> float:
    return float((errors / truths).median())


def _worst(errors: Float[Tensor, " N"], truths: Float[Tensor, " N"]) -> float:
    return float((errors / truths.clamp(min=truths.mean())).max())
