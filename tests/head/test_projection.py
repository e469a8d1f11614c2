"""What a projection carries back, whatever waits, against plain products in float64.

The bfloat16 head of a GPU is followed on a CPU, too, where its products take copies of their factors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kedge.head import Anchor, Head, projection, score
from kedge.head.projection import Projection, row_width, suits

N, H, V, PADDING = 22, 3, 7, 2
DOUBLE, SINGLE, HALF = torch.float64, torch.float32, torch.bfloat16
NEEDS = [(True, True, True), (False, True, False), (True, False, True)]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def normal(*shape: int) -> Tensor:
    """Numbers that bfloat16 holds as they are."""
    made = torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))
    return made.to(HALF).to(DOUBLE)


HIDDEN, WEIGHT, BIAS, PULLED = normal(N, H), normal(V + PADDING, H), normal(V + PADDING), normal(N, V)


def source(dtype: torch.dtype, device: str = "cpu") -> Anchor:
    hidden, weight, bias = (each.to(device=device, dtype=dtype) for each in (HIDDEN, WEIGHT, BIAS))
    return Anchor(hidden, Head(weight, bias, vocabulary=V))


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(projection, "suits", lambda _device, factors, logits: suits("cuda", factors, logits))


def chunks_of(size: int) -> list[slice]:
    return [slice(start, min(start + size, N)) for start in range(0, N, size)]


def assert_carried_back(
    made: Projection, size: int, needs: tuple[bool, ...], unpulled: tuple[int, ...], tolerance: float
) -> None:
    """Logits and gradients of chunks of a size, of which nothing pulls at some."""
    pulled = torch.zeros_like(PULLED)
    for index, rows in enumerate(chunks_of(size)):
        made.load(rows)
        assert_near(made.logits, HIDDEN[rows] @ WEIGHT[:V].T, tolerance)
        if index not in unpulled:
            pulled[rows] = PULLED[rows]
            made.logits.copy_(PULLED[rows])
            made.accumulate(rows)
    truths = (pulled @ WEIGHT[:V], torch.zeros_like(WEIGHT), torch.zeros_like(BIAS))
    truths[1][:V], truths[2][:V] = pulled.T @ HIDDEN, pulled.sum(0)
    for needed, found, truth in zip(needs, made.gradients(), truths, strict=True):
        assert (found is not None) == needed
        if found is not None:
            assert_near(found, truth, tolerance)


def assert_near(found: Tensor, truth: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(found.cpu().double(), truth, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("gathered", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 4, 8, 22])
@pytest.mark.parametrize("unpulled", [(), (0,), (1,), (0, 1, 2)], ids=str)
@pytest.mark.parametrize("needs", NEEDS, ids=str)
def test_gradients_are_those_of_the_chunks_that_pull(
    gathered: int,
    size: int,
    unpulled: tuple[int, ...],
    needs: tuple[bool, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(projection, "GATHERED", gathered)
    made = Projection(source(DOUBLE), DOUBLE, size, needs)
    assert_carried_back(made, size, needs, unpulled, 1e-12)


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("slab_rows", [1, 4, 9, 1000])
@pytest.mark.parametrize("unpulled", [(), (0,), (2,)], ids=str)
@pytest.mark.parametrize("needs", NEEDS, ids=str)
def test_gradients_that_wait_apart_are_those_of_the_chunks_that_pull(
    slab_rows: int, unpulled: tuple[int, ...], needs: tuple[bool, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(projection, "SLAB_ROWS", slab_rows)
    made = Projection(source(HALF), SINGLE, 4, needs)
    assert_carried_back(made, 4, needs, unpulled, 1e-5)
    assert all(each is None or each.dtype == SINGLE for each in made.gradients())


def heights(made: Projection, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, torch.dtype]]:
    """How many rows' gradients, of which dtype, each product of a hidden state's gradient has."""
    seen = []
    multiply = projection.multiply

    def counting(left: Tensor, right: Tensor, out: Tensor, *, add: bool = False) -> Tensor:
        assert left.dtype == right.dtype
        if out.shape[1] == H and left.shape[1] == V:
            seen.append((len(left), left.dtype))
        return multiply(left, right, out, add=add)

    monkeypatch.setattr(projection, "multiply", counting)
    for rows in chunks_of(4):
        made.load(rows)
        made.accumulate(rows)
    made.gradients()
    return seen


def test_two_chunks_go_back_together_where_a_weight_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every product with the weight's gradient reads and writes the whole of it."""
    made = Projection(source(DOUBLE), DOUBLE, 4, (True, True, False))
    assert heights(made, monkeypatch) == [(8, DOUBLE), (8, DOUBLE), (6, DOUBLE)]


@pytest.mark.parametrize("dtype", [DOUBLE, HALF])
@pytest.mark.usefixtures("as_on_a_gpu")
def test_nothing_waits_where_no_weight_trains(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Projection(source(dtype), DOUBLE if dtype == DOUBLE else SINGLE, 4, (True, False, False))
    assert heights(made, monkeypatch) == [(4, dtype)] * 5 + [(2, dtype)]
    assert len(made._gradients) == 4


@pytest.mark.usefixtures("as_on_a_gpu")
def test_bfloat16_is_never_converted_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(projection, "SLAB_ROWS", 9)
    given = source(HALF)
    made = Projection(given, SINGLE, 4, (True, True, False))
    assert made._weight.data_ptr() == given.head.weight.data_ptr()
    assert (made._buffer.dtype, len(made._buffer)) == (SINGLE, 4)
    assert heights(made, monkeypatch) == [(8, HALF), (8, HALF), (6, HALF)]
    assert Projection(given, SINGLE, 4, (False, False, False))._gradients.numel() == 0  # an anchor has none


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("dtype", [DOUBLE, HALF])
def test_several_gradients_of_the_same_rows(dtype: torch.dtype) -> None:
    """As for outputs whose gradients are made in forward: each is handed out before the next takes its place."""
    made = Projection(source(dtype), DOUBLE if dtype == DOUBLE else SINGLE, 4, (True, False, False))
    for rows in chunks_of(4):
        made.load(rows)
        for factor in (1.0, -4.0):
            made.logits.copy_(factor * PULLED[rows])
            made.accumulate(rows)
            assert_near(made.hidden_gradient(rows), factor * PULLED[rows] @ WEIGHT[:V], 1e-5)


def test_what_is_multiplied_as_it_is() -> None:
    assert suits("cuda", {HALF}, SINGLE)
    assert not suits("cuda", {HALF}, DOUBLE)  # an anchor in float64 has all logits in it
    assert not suits("cpu", {HALF}, SINGLE)
    for factors in ({HALF, SINGLE}, {SINGLE}, {torch.float16}):
        assert not suits("cuda", factors, SINGLE)


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("call", ["score", "reduce"])
def test_a_whole_call_in_bfloat16(
    call: str, make_case: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against float64, as accurate as bfloat16 gradients can be."""
    case = make_case(dtype=HALF, rows=N, train=("policy.hidden", "policy.weight", "reference.hidden"))
    exact = make_case(rows=N, train=("policy.hidden", "policy.weight", "reference.hidden"))
    for to, of in ((exact, case), *((exact.anchors[n], case.anchors[n]) for n in case.anchors)):
        to.hidden.data, to.head.weight.data = of.hidden.detach().double(), of.head.weight.detach().double()
    exact.upstream = {name: each.double() for name, each in case.upstream.items()}
    truth = exact.score(backend="dense")
    monkeypatch.setattr(projection, "SLAB_ROWS", 9)
    scores, found = getattr(case, call)(chunk_rows=4, backend="chunked")
    for name, value in truth[0].items():
        torch.testing.assert_close(scores[name].double(), value, rtol=1e-5, atol=1e-5, msg=name)
    for name, value in truth[1].items():
        error = (found[name].double() - value).norm() / value.norm()
        assert error < 6e-3, (name, error)


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("dtype", [DOUBLE, HALF])
def test_rows_may_be_wider_than_the_vocabulary(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where the rows of an odd vocabulary would begin anywhere."""
    monkeypatch.setattr(projection, "row_width", lambda device, tokens: row_width("cuda", tokens))
    monkeypatch.setattr(projection, "SLAB_ROWS", 9)
    needs = (True, True, True)
    made = Projection(source(dtype), DOUBLE if dtype == DOUBLE else SINGLE, 4, needs)
    assert_carried_back(made, 4, needs, (1,), 1e-5)
    for buffer in (made._buffer, made._gradients):
        assert buffer.stride() == (64, 1)


@needs_gpu
def test_products_on_a_gpu_are_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(projection, "SLAB_ROWS", 9)  # several products add to one gradient
    made = Projection(source(HALF, "cuda"), SINGLE, 4, (True, True, True))
    assert made._gradients.dtype == HALF
    assert_carried_back(made, 4, (True, True, True), (), 1e-5)


@needs_gpu
def test_a_small_kl_on_a_gpu() -> None:
    """The trap of products that are rounded to bfloat16 before they become float32."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(64, 32, generator=generator).bfloat16()
    anchor = (hidden.float() + 0.05 * torch.randn(64, 32, generator=generator)).bfloat16()
    weight = torch.randn(501, 32, generator=generator).bfloat16()
    want = ["reference.reverse_kl"]

    def call(dtype: torch.dtype, device: str) -> Tensor:
        h, r, w = (each.to(device=device, dtype=dtype) for each in (hidden, anchor, weight))
        targets = torch.zeros(64, dtype=torch.int64, device=device)
        return score(h, Head(w), targets, anchors={"reference": (r, Head(w))}, want=want)[want[0]].cpu()

    found, truth = call(HALF, "cuda").double(), call(DOUBLE, "cpu")
    assert ((found - truth).norm() / truth.norm()) < 1e-4
