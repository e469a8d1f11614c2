"""What a projection carries back, whatever waits in its buffer, against plain products in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kedge.head import Anchor, Head, projection
from kedge.head.projection import Projection

N, H, V, PADDING = 22, 3, 7, 2


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


HIDDEN, WEIGHT, BIAS, PULLED = normal(N, H), normal(V + PADDING, H), normal(V + PADDING), normal(N, V)
SOURCE = Anchor(HIDDEN, Head(WEIGHT, BIAS, vocabulary=V))


def chunks_of(size: int) -> list[slice]:
    return [slice(start, min(start + size, N)) for start in range(0, N, size)]


@pytest.mark.parametrize("gathered", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 4, 8, 22])
@pytest.mark.parametrize("unpulled", [(), (0,), (1,), (0, 1, 2)], ids=str)
@pytest.mark.parametrize("needs", [(True, True, True), (False, True, False), (True, False, True)], ids=str)
def test_gradients_are_those_of_the_chunks_that_pull(
    gathered: int,
    size: int,
    unpulled: tuple[int, ...],
    needs: tuple[bool, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(projection, "GATHERED", gathered)
    made, pulled = Projection(SOURCE, torch.float64, size, needs), torch.zeros(N, V, dtype=torch.float64)
    for index, rows in enumerate(chunks_of(size)):
        made.load(rows)
        torch.testing.assert_close(made.logits, HIDDEN[rows] @ WEIGHT[:V].T)
        if index not in unpulled:
            pulled[rows] = PULLED[rows]
            made.logits.copy_(PULLED[rows])
            made.accumulate(rows)
    truths = (pulled @ WEIGHT[:V], torch.zeros_like(WEIGHT), torch.zeros_like(BIAS))
    truths[1][:V], truths[2][:V] = pulled.T @ HIDDEN, pulled.sum(0)
    for needed, found, truth in zip(needs, made.gradients(), truths, strict=True):
        assert (found is not None) == needed
        if found is not None:
            torch.testing.assert_close(found, truth, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("weight_trains", "heights"), [(True, [8, 8, 6]), (False, [4, 4, 4, 4, 4, 2])])
def test_two_chunks_go_back_together_where_a_weight_trains(
    weight_trains: bool, heights: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every product with the weight's gradient reads and writes the whole of it."""
    made = Projection(SOURCE, torch.float64, 4, (True, weight_trains, False))
    seen: list[int] = []
    multiply = projection.multiply

    def counting(left: Tensor, right: Tensor, out: Tensor, *, add: bool = False) -> Tensor:
        if out.shape[1] == H and left.shape[1] == V:
            seen.append(len(left))
        return multiply(left, right, out, add=add)

    monkeypatch.setattr(projection, "multiply", counting)
    for rows in chunks_of(4):
        made.load(rows)
        made.accumulate(rows)
    made.gradients()
    assert seen == heights


def test_several_gradients_of_the_same_rows() -> None:
    """As for outputs whose gradients are made in forward: each is handed out before the next takes its place."""
    made = Projection(SOURCE, torch.float64, 4, (True, False, False))
    for rows in chunks_of(4):
        made.load(rows)
        for factor in (1.0, -3.0):
            made.logits.copy_(factor * PULLED[rows])
            made.accumulate(rows)
            torch.testing.assert_close(made.hidden_gradient(rows), factor * PULLED[rows] @ WEIGHT[:V])
