"""Few outputs of a frozen head: their gradients are made in forward, and no logits a second time."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.head.test_agreement import VARIANTS, assert_same
from tests.head.test_cost import CHUNK, inputs, ledger, spend_score

from kedge.head import Head, score

WANTS = {
    "log_prob": ["log_prob"],
    "entropy": ["entropy"],
    "log_prob, reverse KL": ["log_prob", "reference.reverse_kl"],
    "forward KL, total variation": ["reference.forward_kl", "reference.total_variation"],
    "what does not train beside one that does": ["reference.log_prob", "log_normalizer"],
}
FROZEN = ("policy.hidden",)


@pytest.mark.parametrize("want", WANTS.values(), ids=WANTS)
@pytest.mark.parametrize(
    "variant", ["bias", "everything", "masked crosswise", "masked in the reference", "one token"]
)
def test_the_kept_gradients_are_those_of_the_definition(
    variant: str, want: list[str], make_case: Callable[..., Any]
) -> None:
    case = make_case(**{**VARIANTS[variant], "train": FROZEN})
    found = case.score(want, chunk_rows=4)
    for mine, truth in zip(found, case.score(want, backend="dense"), strict=True):
        assert_same(truth, mine, 1e-10)
    assert all(
        scores.grad_fn is None or type(scores.grad_fn).__name__ == "_KeptBackward"
        for scores in found[0].values()
    )
    assert any(scores.requires_grad for scores in found[0].values())


@pytest.mark.parametrize(
    ("want", "units"),
    [
        ({"log_prob"}, 2 + 2),
        ({"log_prob", "reference.reverse_kl"}, 4 + 4),
        ({"log_prob", "reference.log_prob"}, 4 + 2),
        ({"log_prob", "entropy", "reference.reverse_kl"}, 4 + 4 + 2),  # three of them: made again instead
    ],
)
def test_products(want: set[str], units: float) -> None:
    assert spend_score(want, pulled=want - {"reference.log_prob"}, train_head=False).units == pytest.approx(
        units
    )


def test_without_gradients_nothing_is_kept() -> None:

    with ledger() as found, torch.no_grad():
        score(**inputs(train_head=False), want={"log_prob"}, chunk_rows=CHUNK)
    assert found.units == pytest.approx(2)


def test_one_output_may_be_used_twice_in_a_nonlinear_loss(make_case: Callable[..., Any]) -> None:
    case = make_case(train=FROZEN)
    want = ["log_prob", "reference.reverse_kl"]

    def gradient(**options: Any) -> torch.Tensor:

        scores = score(case.hidden, case.head, case.targets, anchors=case.anchors, want=want, **options)
        loss = (scores["log_prob"].exp() * scores["reference.reverse_kl"]).sum() + scores["log_prob"][
            1
        ].square()
        return torch.autograd.grad(loss, case.hidden)[0]

    torch.testing.assert_close(gradient(chunk_rows=3), gradient(backend="dense"), rtol=1e-10, atol=1e-12)


def test_an_infinite_value_has_no_gradient_however_hard_it_is_pulled() -> None:

    hidden = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    bias = torch.tensor([0.0, -math.inf, 0.0, 0.0, 0.0], dtype=torch.float64)
    head = Head(torch.randn(5, 4, dtype=torch.float64), bias)
    log_prob = score(hidden, head, torch.tensor([0, 1, 2]), want={"log_prob"})["log_prob"]
    assert log_prob.isinf().tolist() == [False, True, False]
    log_prob.exp().log().sum().backward()  # at the masked token: an upstream gradient of 1/0
    assert hidden.grad.isfinite().all()
    assert hidden.grad[1].tolist() == [0.0] * 4
