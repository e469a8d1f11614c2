"""The products of a bfloat16 head on a GPU; what the slab gathers is tested on a CPU, with products of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kedge.head import Anchor, Head, score, slab_projection, workspace
from kedge.head.projection import Projection
from kedge.head.slab_projection import SlabProjection, make_projection, suits

N, H, V = 22, 3, 7
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def source(dtype: torch.dtype = torch.bfloat16, device: str = "cpu", padding: int = 2) -> Anchor:
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (
        torch.randn(shape, generator=generator).to(device=device, dtype=dtype)
        for shape in ((N, H), (V + padding, H), (V + padding,))
    )
    return Anchor(hidden, Head(weight, bias, vocabulary=V))


def gradients(
    projection: Any, chunks: list[slice], logit_gradients: Tensor
) -> tuple[Tensor, list[Tensor | None]]:
    """The logits that it makes of these chunks, and what it carries on of these gradients."""
    logits = torch.zeros(N, V)
    for rows in chunks:
        projection.load(rows)
        logits[rows] = projection.logits
        projection.logits.copy_(logit_gradients[rows])
        projection.accumulate(rows)
    return logits, projection.gradients()


def chunks_of(size: int, *, without: int = -1) -> list[slice]:
    found = [slice(start, min(start + size, N)) for start in range(0, N, size)]
    return [rows for index, rows in enumerate(found) if index != without]


@pytest.mark.parametrize("slab_rows", [1, 4, 9, 1000])
@pytest.mark.parametrize("without", [-1, 0, 2])
@pytest.mark.parametrize("needs", [(True, True, True), (False, True, False), (True, False, True)])
def test_the_slab_changes_nothing(
    slab_rows: int, without: int, needs: tuple[bool, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients that bfloat16 holds as they are, some chunks of which nothing pulls at."""
    monkeypatch.setattr(slab_projection, "SLAB_ROWS", slab_rows)
    pulled = torch.randint(-8, 9, (N, V), generator=torch.Generator().manual_seed(1)) / 16
    chunks = chunks_of(4, without=without)
    logits, found = gradients(SlabProjection(source(), 4, needs), chunks, pulled)
    expected_logits, truth = gradients(Projection(source(), torch.float32, 4, needs), chunks, pulled)
    torch.testing.assert_close(logits, expected_logits)
    for value, true in zip(found, truth, strict=True):
        assert (value is None) == (true is None)
        if value is not None and true is not None:
            assert value.dtype == torch.float32
            torch.testing.assert_close(value, true)


def test_chunks_are_gathered_before_they_are_multiplied(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []

    def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
        assert left.dtype == right.dtype == torch.bfloat16
        assert total.dtype == torch.float32
        shapes.append((left.shape[1], right.shape[0]))

    monkeypatch.setattr(slab_projection, "_add_product", add_product)
    monkeypatch.setattr(slab_projection, "SLAB_ROWS", 9)
    gradients(SlabProjection(source(), 4, (True, True, False)), chunks_of(4), torch.ones(N, V))
    assert shapes == [(8, 8), (8, 8), (6, 6)]
    shapes.clear()
    frozen = SlabProjection(source(), 4, (True, False, False))
    gradients(frozen, chunks_of(4), torch.ones(N, V))
    assert shapes == []
    assert frozen._slab.shape[0] == 4  # a chunk: no room is taken for what nobody needs
    assert SlabProjection(source(), 4, (False, False, True))._slab.numel() == 0


def test_it_is_for_bfloat16_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    half, single, double = torch.bfloat16, torch.float32, torch.float64
    assert suits("cuda", {half}, single)
    assert not suits("cuda", {half}, double)  # an anchor in float64 has all logits in it
    assert not suits("cpu", {half}, single)
    for factors in ({half, single}, {single}, {torch.float16}):
        assert not suits("cuda", factors, single)

    def made() -> type:
        tensors = torch.empty(2, 3, dtype=half), torch.empty(4, 3, dtype=half)
        return type(make_projection(Anchor(tensors[0], Head(tensors[1])), single, 2, (False, False)))

    assert made() is Projection
    monkeypatch.setattr(slab_projection, "suits", lambda *_: True)
    assert made() is SlabProjection


@pytest.mark.parametrize("call", ["score", "reduce"])
def test_a_whole_call_through_it(
    call: str, make_case: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against float64, as accurate as bfloat16 gradients can be."""
    case = make_case(
        dtype=torch.bfloat16, rows=N, train=("policy.hidden", "policy.weight", "reference.hidden")
    )
    exact = make_case(rows=N, train=("policy.hidden", "policy.weight", "reference.hidden"))
    for to, of in ((exact, case), *((exact.anchors[n], case.anchors[n]) for n in case.anchors)):
        to.hidden.data, to.head.weight.data = of.hidden.detach().double(), of.head.weight.detach().double()
    exact.upstream = {name: each.double() for name, each in case.upstream.items()}
    truth = exact.score(backend="dense")
    monkeypatch.setattr(slab_projection, "SLAB_ROWS", 9)
    monkeypatch.setattr(
        workspace, "make_projection", lambda s, dtype, rows, needs: SlabProjection(s, rows, needs)
    )
    scores, found = getattr(case, call)(chunk_rows=4, backend="chunked")
    for name, value in truth[0].items():
        torch.testing.assert_close(scores[name].double(), value, rtol=1e-5, atol=1e-5, msg=name)
    for name, value in truth[1].items():
        error = (found[name].double() - value).norm() / value.norm()
        assert error < 6e-3, (name, error)


@needs_gpu
def test_products_on_a_gpu_are_float32() -> None:
    given = source(device="cuda")
    pulled = torch.randn(N, V, generator=torch.Generator().manual_seed(1)).bfloat16().float().cuda()
    projection = make_projection(given, torch.float32, 4, (True, True, True))
    assert type(projection) is SlabProjection
    logits, found = gradients(projection, chunks_of(4), pulled)
    torch.testing.assert_close(logits, given.hidden.cpu().float() @ given.head.weight[:V].cpu().float().T)
    truth = gradients(Projection(given, torch.float32, 4, (True, True, True)), chunks_of(4), pulled)[1]
    torch.testing.assert_close(found, truth)


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

    found, truth = call(torch.bfloat16, "cuda").double(), call(torch.float64, "cpu")
    assert ((found - truth).norm() / truth.norm()) < 1e-4
