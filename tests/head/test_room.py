"""Memory that the head lends again: only when nobody uses it, and not for ever."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from kedge.head import Head, reduce
from kedge.head.room import LEAST, UNUSED, forget, room_for

PLAIN = torch.ones(1)
COUNT = LEAST // 4


@pytest.fixture(autouse=True)
def nothing_kept() -> Iterator[None]:
    forget()
    yield
    forget()


def gradient(seed: int, width: int = 64) -> Tensor:
    """Return the gradient of a head's weight, more than ``LEAST`` bytes."""
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(8192, width, generator=draw, requires_grad=True)
    loss, _ = reduce(
        torch.randn(64, width, generator=draw), Head(weight), torch.arange(64),
        lambda scores, rows: scores["log_prob"].sum(), want=["log_prob"], chunk_rows=32,
    )  # fmt: skip
    loss.backward()
    assert weight.grad is not None
    assert weight.grad.nbytes >= LEAST
    return weight.grad


def test_a_gradient_that_is_held_is_not_written_over() -> None:
    first, truth = gradient(0), gradient(0).clone()
    gradient(1)
    assert torch.equal(first, truth)


def test_a_view_holds_it_as_well() -> None:
    view = room_for(PLAIN, (2, COUNT), torch.float32)[1, :3].fill_(7.0)
    room_for(PLAIN, (2, COUNT), torch.float32).zero_()
    assert view.tolist() == [7.0, 7.0, 7.0]


def test_what_is_gone_is_lent_again() -> None:
    place = gradient(0).data_ptr()
    assert gradient(1).data_ptr() == place


def test_memory_of_another_size_or_type_is_lent_up_to_half_empty() -> None:
    place = room_for(PLAIN, (COUNT, 2), torch.float32).data_ptr()
    assert room_for(PLAIN, (COUNT,), torch.float64).data_ptr() == place
    assert room_for(PLAIN, (COUNT,), torch.float32).data_ptr() == place
    assert room_for(PLAIN, (COUNT, 3), torch.float32).data_ptr() != place


def test_the_smallest_that_serves_is_lent() -> None:
    large, small = (room_for(PLAIN, (count,), torch.float32) for count in (2 * COUNT, COUNT + 8))
    place = small.data_ptr()
    del large, small
    assert room_for(PLAIN, (COUNT,), torch.float32).data_ptr() == place


def test_what_serves_nobody_is_freed() -> None:
    from kedge.head import room

    room_for(PLAIN, (8 * COUNT,), torch.float32)
    for _ in range(UNUSED):
        assert len(room._kept) <= 2
        room_for(PLAIN, (COUNT,), torch.float32)
    assert [each.storage.nbytes() for each in room._kept] == [LEAST]


def test_memory_lent_in_inference_mode_may_be_trained_in_afterwards() -> None:
    with torch.inference_mode():
        place = room_for(PLAIN, (COUNT,), torch.float32).data_ptr()
    after = room_for(PLAIN, (COUNT,), torch.float32)
    assert after.data_ptr() == place
    assert not after.is_inference()
    after.zero_().requires_grad_()


def test_small_memory_and_what_a_mode_wants_to_see_are_left_to_pytorch() -> None:
    from kedge.head import room

    room_for(PLAIN, (COUNT - 1,), torch.float32)
    with FlopCounterMode(display=False):
        room_for(PLAIN, (COUNT,), torch.float32)
    assert room._kept == []


def test_threads_do_not_share_a_chunk() -> None:
    truths = [gradient(seed).clone() for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            for found, true in zip(pool.map(gradient, range(4)), truths, strict=True):
                torch.testing.assert_close(found, true)


def test_a_trained_weight_takes_its_gradient_as_any_other() -> None:
    """As large memory as small, it becomes ``.grad`` without a copy, and is no view of anything."""
    found = gradient(0)
    assert found.is_contiguous()
    assert not found._is_view()
    assert found.untyped_storage().nbytes() == found.nbytes
