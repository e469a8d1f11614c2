"""What a call may cost: logits of a chunk, the products that its outputs need, no gradient that nobody needs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kedge.head import Head, default_chunk_rows, reduce, score

N, H, V, CHUNK = 96, 8, 500, 16


class Ledger(TorchDispatchMode):
    """Notes the largest tensor made, every shape, and the cost of all matrix products in units of N·H·V."""

    def __init__(self) -> None:
        super().__init__()
        self.largest, self.units = 0, 0.0
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if "mm" in function._schema.name:
            rows, inner = args[-2].shape
            self.units += 2 * rows * inner * args[-1].shape[1] / (N * H * V)
        old = {_memory(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and not leaf.is_meta and _memory(leaf) not in old:
                self.largest = max(self.largest, leaf.numel())
                self.shapes.add(tuple(leaf.shape))
        return result


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@contextmanager
def ledger() -> Iterator[Ledger]:
    with Ledger() as found:
        yield found


def inputs(*, train_head: bool = True) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    hidden, reference = torch.randn(2, N, H, generator=generator)
    weight, fixed = torch.randn(2, V, H, generator=generator)
    return {
        "hidden": hidden.requires_grad_(),
        "head": Head(weight.requires_grad_(train_head)),
        "targets": torch.randint(0, V, (N,), generator=generator),
        "anchors": {"reference": (reference, Head(fixed))},
    }


def spend_score(want: set[str], pulled: set[str] | None = None, **options: Any) -> Ledger:
    with ledger() as found:
        scores = score(**inputs(**options), want=want, chunk_rows=CHUNK)
        sum(scores[name].sum() for name in pulled or want).backward()
    return found


def spend_reduce(want: set[str], **options: Any) -> Ledger:
    with ledger() as found:
        loss, _ = reduce(
            **inputs(**options),
            per_token=lambda scores, rows: sum(values.sum() for values in scores.values()),
            want=want,
            chunk_rows=CHUNK,
        )
        loss.backward()
    return found


EVERYTHING = {"log_prob", "entropy", "log_normalizer"} | {
    f"reference.{each}" for each in ("log_prob", "reverse_kl", "forward_kl", "total_variation")
}


@pytest.mark.parametrize("spend", [spend_score, spend_reduce])
def test_at_most_two_chunks_of_logits_exist_and_one_of_a_frozen_head(spend: Any) -> None:
    assert N * V > 4 * CHUNK * V
    assert spend(EVERYTHING).largest == 2 * CHUNK * V
    assert spend(EVERYTHING, train_head=False).largest == CHUNK * V
    with ledger() as dense:
        score(**inputs(), want={"log_prob"}, backend="dense")
    assert dense.largest == N * V


@pytest.mark.parametrize(
    ("want", "score_units", "reduce_units"),
    [
        ({"log_prob"}, 8, 6),
        ({"log_prob", "entropy"}, 8, 6),
        ({"log_prob", "reference.reverse_kl"}, 12, 8),
        (EVERYTHING, 12, 8),
    ],
)
def test_products_are_those_that_the_outputs_need(
    want: set[str], score_units: int, reduce_units: int
) -> None:
    assert spend_score(want).units == pytest.approx(score_units)
    assert spend_reduce(want).units == pytest.approx(reduce_units)


def test_only_what_is_wanted_is_paid_for() -> None:
    frozen_head = spend_reduce({"log_prob"}, train_head=False)
    assert frozen_head.units == pytest.approx(4)
    reference_alone = {"want": {"reference.log_prob"}, "chunk_rows": CHUNK}
    with ledger() as found:
        score(**inputs(), **reference_alone)
    assert found.units == pytest.approx(2)
    # the KL was wanted, but the loss does not use it: backward leaves the reference alone
    assert spend_score({"log_prob", "reference.reverse_kl"}, {"log_prob"}).units == pytest.approx(10)
    with ledger() as found, torch.no_grad():
        reduce(**inputs(), per_token=lambda scores, rows: scores["log_prob"].sum(), want={"log_prob"})
    assert found.units == pytest.approx(2)


@pytest.mark.parametrize("spend", [spend_score, spend_reduce])
def test_a_frozen_head_has_no_gradient_buffer(spend: Any) -> None:
    assert (V, H) in spend(EVERYTHING).shapes
    made = spend(EVERYTHING, train_head=False).shapes
    assert (V, H) not in made


def test_the_default_chunk_follows_from_the_vocabulary() -> None:
    for tokens in (2, 1_000, 32_000, 151_936, 10**6):
        rows = default_chunk_rows(tokens)
        assert 256 <= rows <= 4096
        assert rows == 4096 or rows == 256 or 14e6 < rows * tokens <= 2**24
    with ledger() as found:
        generator = torch.Generator().manual_seed(0)
        hidden, weight = (
            torch.randn(400, 2, generator=generator),
            torch.randn(100_000, 2, generator=generator),
        )
        score(hidden, Head(weight), torch.zeros(400, dtype=torch.int64), want={"log_prob"})
    assert found.largest == 256 * 100_000
