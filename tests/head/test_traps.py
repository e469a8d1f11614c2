"""Bugs that other implementations of such a head had, each with the test that would see it here.

    rounded product        a bfloat16 product cast to float32            test_precision.py, certify/test_accuracy.py
    padded vocabulary      the tail not masked, also under a soft-cap    test_masks.py, and below: as a bias of −∞
    0·(−∞), −∞ − (−∞)      masked in both heads, at the target, alone    test_masks.py, and below: all but one
    32-bit offsets         more logits than an int32 counts              test_triton.py: rows 2³⁰ entries apart
    dropped upstream       the gradient that reaches the entropy         below; test_agreement.py: each output alone
    scaled too late        an upstream gradient after dW was summed      below
    head untrained         LoRA on the head; a tied weight               below; test_interface.py; test_sharded.py
    compiled for a shape   another number of rows compiles again         test_compiled.py
    needless gradient      a frozen head that allocates one              test_cost.py
    filtered gradient      small probabilities whose gradient is left    below

`make acceptance` makes these mistakes in a copy, and wants the tests to fail: test_breaks.py.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from kedge.head import Anchor, Head, reduce, score

BACKENDS = ["chunked", "dense"]
WANT = ("log_prob", "entropy", "reference.reverse_kl", "reference.forward_kl")


def draw(*size: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(size, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def terms(scores: dict[str, Tensor], rows: slice) -> Tensor:
    """A loss whose weights differ by row and output."""
    return sum(
        (torch.linspace(1, 2, 9, dtype=torch.float64)[rows] * (1 + index) * scores[name]).sum()
        for index, name in enumerate(WANT)
    )


def inputs(weight: Tensor, hidden: Tensor | None = None) -> dict[str, Any]:
    return {
        "hidden": draw(9, 4, seed=1) if hidden is None else hidden,
        "head": Head(weight),
        "targets": torch.arange(9),
        "anchors": {"reference": Anchor(draw(9, 4, seed=2), Head(draw(11, 4, seed=3)))},
        "want": WANT,
    }


def loss_by(way: str, given: dict[str, Any]) -> Tensor:
    if way == "reduce":
        return reduce(**given, per_token=terms, chunk_rows=4)[0]
    options = {"backend": "dense"} if way == "dense" else {"chunk_rows": 4}
    return terms(score(**given, **options), slice(0, 9))


# --- padded vocabulary -----------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_a_vocabulary_cut_and_one_masked_are_the_same(backend: str, softcap: float | None) -> None:
    """Catches: −∞ that a soft-cap turns into −softcap (no masked_fill after tanh); a tail that is not cut."""
    weight, bias = draw(11, 4), draw(11, seed=4)
    weight[8:] = 50.0  # what stands in a padded tail is anybody's guess
    masked = bias.clone()
    masked[8:] = -math.inf
    hidden, targets = draw(9, 4, seed=1), torch.arange(9) % 8
    found = [
        score(hidden, head, targets, want=("log_prob", "entropy"), backend=backend)
        for head in (
            Head(weight, bias, softcap=softcap, vocabulary=8),
            Head(weight, masked, softcap=softcap),
            Head(weight[:8], bias[:8], softcap=softcap),
        )
    ]
    for name, value in found[2].items():
        assert value.abs().max() < 60 if softcap is None else value.abs().max() < 2 * softcap + math.log(8)
        for other in found[:2]:
            torch.testing.assert_close(other[name], value, rtol=1e-12, atol=1e-12)


# --- 0·(−∞) ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["score", "reduce", "dense"])
def test_all_but_one_token_masked_in_both_heads(way: str) -> None:
    """The distribution is certain: every output is 0, and so is every gradient. Catches: −∞ in place of −FAR."""
    bias = torch.full((11,), -math.inf, dtype=torch.float64)
    bias[3] = 0.5
    weight, hidden = draw(11, 4).requires_grad_(), draw(9, 4, seed=1).requires_grad_()
    given = inputs(weight, hidden)
    given |= {
        "head": Head(weight, bias),
        "targets": torch.full((9,), 3),
        "anchors": {"reference": Anchor(draw(9, 4, seed=2), Head(draw(11, 4, seed=3), bias))},
    }
    loss = loss_by(way, given)
    loss.backward()
    assert loss.item() == 0.0
    assert not hidden.grad.any()
    assert not weight.grad.any()


# --- dropped or late upstream gradients ------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("beside", [(), ("log_prob",), ("reference.reverse_kl",)])
def test_the_gradient_of_the_entropy_arrives(backend: str, beside: tuple[str, ...]) -> None:
    """∂H/∂l = −p·(log p + H), row by row, whatever else is wanted. Catches: ``entropy=`` left out of the pulls."""
    hidden, weight, upstream = (
        draw(9, 4, seed=1).requires_grad_(),
        draw(11, 4),
        torch.linspace(-1, 2, 9).double(),
    )
    given = inputs(weight, hidden) | {"want": ("entropy", *beside)}
    scores = score(**given, backend=backend)
    (found,) = torch.autograd.grad((upstream * scores["entropy"]).sum(), hidden)
    log_p = (hidden.detach() @ weight.T).log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1, keepdim=True)
    by_hand = -upstream[:, None] * log_p.exp() * (log_p + entropy) @ weight
    torch.testing.assert_close(found, by_hand, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("way", ["score", "reduce"])
def test_a_loss_that_is_scaled_afterwards(way: str) -> None:
    """Catches: ``reduce`` that hands out its gradients without the upstream factor, or with it to some only."""
    factor, found, true = torch.tensor(-0.125, dtype=torch.float64), [], []
    for each, into in ((way, found), ("dense", true)):
        weight, hidden = draw(11, 4).requires_grad_(), draw(9, 4, seed=1).requires_grad_()
        scale = factor.clone().requires_grad_()
        loss = loss_by(each, inputs(weight, hidden))
        (scale * loss + 3.0).backward()
        into += [hidden.grad, weight.grad, scale.grad]
    for one, other in zip(found, true, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("way", ["score", "reduce"])
def test_gradients_of_several_calls_add_up(way: str) -> None:
    """Micro-batches with weights of their own, one optimizer step. Catches: a buffer that calls share."""
    weight, hidden = draw(11, 4).requires_grad_(), draw(9, 4, seed=1)
    whole = weight.detach().clone().requires_grad_()
    loss_by("dense", inputs(whole, hidden)).mul(0.75).backward()
    first = loss_by(way, inputs(weight, hidden))
    second = loss_by(way, inputs(weight, hidden))  # both alive before either goes backward
    (0.25 * first).backward()
    (0.5 * second).backward()
    torch.testing.assert_close(weight.grad, whole.grad, rtol=1e-10, atol=1e-12)


# --- a head that is computed, a head that is tied --------------------------------------------------------


@pytest.mark.parametrize("way", ["score", "reduce", "dense"])
def test_adapters_on_the_head_are_trained(way: str) -> None:
    """LoRA: the weight is W + B·A, W frozen. Catches: a weight that is detached on its way in."""
    base = draw(11, 4)
    down, up = draw(2, 4, seed=5).requires_grad_(), draw(11, 2, seed=6).requires_grad_()
    loss_by(way, inputs(base + up @ down)).backward()
    whole = (base + up @ down).detach().requires_grad_()
    loss_by("dense", inputs(whole)).backward()
    torch.testing.assert_close(up.grad, whole.grad @ down.detach().T, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(down.grad, up.detach().T @ whole.grad, rtol=1e-10, atol=1e-12)
    assert down.grad.abs().min() > 0


@pytest.mark.parametrize("way", ["score", "reduce"])
def test_a_tied_weight_adds_the_gradients_of_both_uses(way: str) -> None:
    """Embedding and head are one parameter. Catches: a gradient written into ``weight.grad`` instead of handed out."""
    tied = draw(11, 4).requires_grad_()
    tokens = torch.arange(9)
    loss_by(way, inputs(tied, torch.tanh(tied[tokens]))).backward()
    embedding, head = (draw(11, 4).requires_grad_() for _ in range(2))
    loss_by("dense", inputs(head, torch.tanh(embedding[tokens]))).backward()
    torch.testing.assert_close(tied.grad, embedding.grad + head.grad, rtol=1e-10, atol=1e-12)
    assert embedding.grad[:9].abs().min() > 0


# --- nothing is filtered ---------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("output", WANT)
def test_small_probabilities_have_their_gradient(backend: str, output: str) -> None:
    """Every row of dW has its digits, down to probabilities of 1e-27. Catches: gradients below 2⁻¹² set to 0."""
    gradients = []
    for dtype, by in ((torch.float32, backend), (torch.float64, "dense")):
        hidden = torch.ones(3, 1, dtype=dtype)
        weight = torch.linspace(0, -60, 300).to(dtype)[:, None].requires_grad_()
        anchor = Anchor(hidden, Head(torch.linspace(0, -50, 300).to(dtype)[:, None]))
        scores = score(
            hidden,
            Head(weight),
            torch.zeros(3, dtype=torch.int64),
            anchors={"reference": anchor},
            want=[output],
            backend=by,
        )
        gradients += torch.autograd.grad(scores[output].sum(), weight)
    found, true = gradients
    assert true.abs().min() < 1e-20
    assert ((found - true) / true).abs().max() < 1e-4
