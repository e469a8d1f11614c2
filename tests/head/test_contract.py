"""What autograd, autocast and mixed precision may expect of the head."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kedge.head import Head, reduce, score, score_logits

FROZEN = ("policy.hidden",)
WANT = ["log_prob", "reference.reverse_kl"]


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("train", [FROZEN, ("policy.hidden", "policy.weight")])
def test_activation_checkpointing(train: tuple[str, ...], make_case: Callable[..., Any]) -> None:
    """It lets saved tensors be unpacked once. Seen to fail with ``ctx.saved_tensors`` read twice."""
    case = make_case(train=train)

    def values(hidden: Tensor) -> Tensor:
        scores = score(hidden, case.head, case.targets, anchors=case.anchors, want=WANT, chunk_rows=4)
        return scores["log_prob"].sum() + scores["reference.reverse_kl"].sum()

    (plain,) = torch.autograd.grad(values(case.hidden), case.hidden)
    (again,) = torch.autograd.grad(checkpoint(values, case.hidden, use_reentrant=False), case.hidden)
    torch.testing.assert_close(again, plain, rtol=0, atol=0)


def test_activation_checkpointing_of_logits() -> None:
    logits, targets = draw(5, 7).requires_grad_(), torch.arange(5)

    def value(each: Tensor) -> Tensor:
        return score_logits(each, targets, want=["log_prob"])["log_prob"].sum()

    (plain,) = torch.autograd.grad(value(logits), logits)
    (again,) = torch.autograd.grad(checkpoint(value, logits, use_reentrant=False), logits)
    torch.testing.assert_close(again, plain, rtol=0, atol=0)


@pytest.mark.parametrize("train", [FROZEN, ("policy.hidden", "policy.weight")])
def test_a_second_derivative_is_refused(train: tuple[str, ...], make_case: Callable[..., Any]) -> None:
    """It would be dropped from a gradient penalty without a word."""
    case = make_case(train=train)
    given = (case.hidden, case.head, case.targets)
    total = score(*given, want=["entropy"])["entropy"].sum()
    with pytest.raises(RuntimeError, match='take backend="dense"'):
        torch.autograd.grad(total, case.hidden, create_graph=True)
    loss, _ = reduce(*given, lambda scores, rows: scores["entropy"].sum(), want=["entropy"])
    with pytest.raises(RuntimeError, match="create_graph=True"):
        torch.autograd.grad(loss, case.hidden, create_graph=True)
    dense = score(*given, want=["entropy"], backend="dense")["entropy"].sum()
    assert torch.autograd.grad(dense, case.hidden, create_graph=True)[0].requires_grad


def test_a_second_derivative_in_logits_is_refused() -> None:
    logits = draw(5, 7).requires_grad_()
    total = score_logits(logits, torch.arange(5), want=["entropy"])["entropy"].sum()
    with pytest.raises(RuntimeError, match=r"take the functions of kedge\.divergence"):
        torch.autograd.grad(total, logits, create_graph=True)


@pytest.mark.parametrize("backend", ["chunked", "dense"])
def test_autocast_does_not_reach_logits(backend: str) -> None:
    """Rounded to bfloat16 the KL of a drift of 0.01 would be off by a half."""
    hidden, weight = draw(32, 64), draw(500, 64, seed=1)
    anchors = {"reference": (hidden + 0.01 * draw(32, 64, seed=2), Head(weight))}
    given = {"targets": torch.arange(32), "anchors": anchors, "want": WANT, "backend": backend}
    plain = score(hidden, Head(weight), **given)
    with torch.autocast("cpu", torch.bfloat16):
        inside = score(hidden, Head(weight), **given)
    for name, value in plain.items():
        assert inside[name].dtype == torch.float32
        torch.testing.assert_close(inside[name], value, rtol=0, atol=0)


def test_a_scaled_loss_of_float16_keeps_its_gradients() -> None:
    """Seen to fail with gradients cast to float16 before they are multiplied by the loss's scale: nearly all were 0."""
    hidden, weight = (draw(*shape, dtype=torch.float16) for shape in ((8, 16), (50, 16)))
    exact = [each.double().requires_grad_() for each in (hidden, weight)]
    rounded = [each.requires_grad_() for each in (hidden, weight)]

    def loss_of(tensors: list[Tensor]) -> Tensor:
        def per_token(scores: dict[str, Tensor], rows: slice) -> Tensor:
            return 1e-8 * scores["log_prob"].sum()

        return reduce(tensors[0], Head(tensors[1]), torch.arange(8), per_token, want=["log_prob"])[0]

    for tensors in (exact, rounded):
        (2.0**24 * loss_of(tensors)).backward()
    for found, truth in zip(rounded, exact, strict=True):
        assert found.grad is not None
        assert truth.grad is not None
        assert found.grad.dtype == torch.float16
        assert (found.grad.double() - truth.grad).norm() < 1e-3 * truth.grad.norm()


def test_a_scaled_loss_of_bfloat16_is_rounded_once() -> None:
    """Seen to fail with gradients cast before they are multiplied: off by as much again."""
    hidden, weight = (draw(*shape, dtype=torch.bfloat16).requires_grad_() for shape in ((8, 16), (50, 16)))
    exact = [each.detach().double().requires_grad_() for each in (hidden, weight)]

    def loss_of(hidden: Tensor, weight: Tensor) -> Tensor:
        return reduce(
            hidden,
            Head(weight),
            torch.arange(8),
            lambda scores, rows: scores["entropy"].sum(),
            want=["entropy"],
        )[0]

    (0.7 * loss_of(hidden, weight)).backward()
    (0.7 * loss_of(*exact)).backward()
    for found, truth in zip((hidden, weight), exact, strict=True):
        assert found.grad is not None
        assert truth.grad is not None
        rounded = truth.grad.bfloat16()
        assert (found.grad == rounded).double().mean() > 0.98  # float32 may fall on the other side of a tie


@pytest.mark.parametrize("trains", [True, False])
def test_reduce_refuses_a_loss_with_parameters_of_its_own(trains: bool) -> None:
    """Their gradient was missing without a word; in a chunk that is not the first, too, or if nothing else trains."""
    hidden, weight, temperature = (
        draw(4, 3).requires_grad_(trains),
        draw(9, 3),
        torch.ones(()).requires_grad_(),
    )

    def loss(per_token: Callable[..., Tensor]) -> Tensor:
        return reduce(hidden, Head(weight), torch.arange(4), per_token, want=["log_prob"], chunk_rows=2)[0]

    def late(scores: dict[str, Tensor], rows: slice) -> Tensor:
        return (scores["log_prob"] * (temperature if rows.start > 0 else 1.0)).sum()

    for each in (lambda scores, rows: (2 * temperature * scores["log_prob"]).sum(), late):
        with pytest.raises(ValueError, match=r"a tensor of shape \(\) that requires a gradient"):
            loss(each)
        with torch.no_grad():
            assert not loss(each).requires_grad
    found = loss(lambda scores, rows: (2 * temperature.detach() * scores["log_prob"]).sum())
    assert found.requires_grad == trains


def test_reduce_refuses_a_loss_that_pulls_at_an_earlier_chunk() -> None:
    """Whose gradients have been made; they were 0 without a word."""
    earlier: list[Tensor] = []

    def per_token(scores: dict[str, Tensor], rows: slice) -> Tensor:
        earlier.append(scores["log_prob"])
        return torch.stack([each.sum() for each in earlier]).sum()

    with pytest.raises(ValueError, match="none of this chunk's scores"):
        reduce(
            draw(4, 3).requires_grad_(),
            Head(draw(9, 3)),
            torch.arange(4),
            per_token,
            want=["log_prob"],
            chunk_rows=2,
        )


def test_scores_that_are_written_over_for_a_metric_move_no_gradient() -> None:
    hidden, weight = draw(4, 3).requires_grad_(), draw(9, 3)

    def gradient(clip: bool) -> Tensor:
        def per_token(scores: dict[str, Tensor], rows: slice) -> Tensor:
            loss = scores["entropy"].sum()
            if clip:
                scores["entropy"].detach().clamp_(max=0.5)
            return loss

        loss, scores = reduce(hidden, Head(weight), torch.arange(4), per_token, want=["entropy"])
        assert (scores["entropy"] > 0.5).any()
        return torch.autograd.grad(loss, hidden)[0]

    assert torch.equal(gradient(clip=True), gradient(clip=False))


def test_targets_that_are_written_over_are_noticed() -> None:
    """As a buffer of tokens that is filled anew before backward. The gradient was that of other tokens."""
    hidden, head, targets = draw(5, 4).requires_grad_(), Head(draw(7, 4).requires_grad_()), torch.arange(5)
    total = score(hidden, head, targets, want=["log_prob"])["log_prob"].sum()
    targets.fill_(6)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


@pytest.mark.usefixtures("unchecked")
def test_a_factor_that_is_to_be_learnt_is_refused() -> None:
    factor, weight = torch.tensor(1.3, requires_grad=True), draw(9, 3)
    with pytest.raises(ValueError, match="temperature requires a gradient"):
        score(draw(4, 3), Head(weight), torch.arange(4), want=["log_prob"], temperature=factor)
    for name in ("scale", "softcap"):
        with pytest.raises(ValueError, match=f"{name} requires a gradient"):
            Head(weight, **{name: factor})


def test_a_score_that_is_kept_keeps_no_weight() -> None:
    """After backward autograd lets saved tensors go. Seen to fail with the request itself in the graph."""
    hidden, weight = draw(4, 3).requires_grad_(), draw(9, 3)
    reference = draw(4, 3, seed=1), Head(2 * weight)
    alive = weakref.ref(reference[1].weight)
    scores = score(
        hidden, Head(weight.requires_grad_()), torch.arange(4), anchors={"reference": reference}, want=WANT
    )
    sum(scores.values()).sum().backward()
    del reference
    gc.collect()
    assert scores["log_prob"].grad_fn is not None
    assert alive() is None


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.usefixtures("unchecked")
def test_a_quantised_weight_is_refused(dtype: torch.dtype) -> None:
    """Its scales are elsewhere."""
    weight = draw(9, 3).to(dtype)
    with pytest.raises(ValueError, match="'policy' has a weight of torch"):
        score(draw(4, 3), Head(weight), torch.arange(4), want=["log_prob"])


@pytest.mark.usefixtures("unchecked")
def test_what_makes_no_sense_is_refused() -> None:
    hidden, weight = draw(4, 3), draw(9, 3)
    with pytest.raises(ValueError, match="targets are torch"):
        score(hidden, Head(weight), torch.rand(4), want=["log_prob"])
    with pytest.raises(ValueError, match="temperature is inf"):
        score(hidden, Head(weight), torch.arange(4), want=["log_prob"], temperature=float("inf"))
    with pytest.raises(ValueError, match=r"weight has shape \(27,\)"):
        Head(weight.flatten())
    for setting in ({"scale": float("inf")}, {"softcap": float("inf")}):
        with pytest.raises(ValueError, match="finite"):
            Head(weight, **setting)


def test_an_anchor_that_nobody_wants_costs_nothing() -> None:
    """Its float64 does not make everything float64."""
    anchors = {"reference": (draw(4, 3, dtype=torch.float64), Head(draw(9, 3, dtype=torch.float64)))}
    found = score(draw(4, 3), Head(draw(9, 3)), torch.arange(4), anchors=anchors, want=["log_prob"])
    assert found["log_prob"].dtype == torch.float32


@pytest.mark.parametrize("learns", [True, False])
@pytest.mark.parametrize("way", ["score", "reduce"])
def test_a_gradient_holds_nothing_of_the_memory_that_it_was_given(way: str, learns: bool) -> None:
    """Fresh memory is NaN here: padding rows and a loss without gradients leave zeros."""
    hidden, weight = torch.randn(5, 3, requires_grad=True), torch.randn(9, 3, requires_grad=True)
    given = {
        "hidden": hidden,
        "head": Head(weight, vocabulary=7),
        "targets": torch.zeros(5, dtype=torch.int64),
    }

    def loss(scores: dict[str, Tensor], rows: slice | None = None) -> Tensor:
        return (
            (scores["log_prob"] * (1.0 if learns else 0.0)).sum()
            if way == "score" or learns
            else torch.zeros(())
        )

    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        if way == "score":
            found = loss(score(**given, want={"log_prob"}, backend="chunked", chunk_rows=2))
        else:
            found, _ = reduce(**given, want={"log_prob"}, backend="chunked", chunk_rows=2, per_token=loss)
        found.backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert weight.grad is not None
    assert (weight.grad[7:] == 0).all()
    assert weight.grad.isfinite().all()
    assert bool(weight.grad[:7].any()) == learns
