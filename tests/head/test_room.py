"""Memory that the head lends again: only when nobody uses it, and not for ever."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from kedge.head import Head, reduce, room
from kedge.head.room import LEAST, UNUSED, forget, room_for

PLAIN = torch.ones(1)
COUNT = LEAST // 4


@pytest.fixture(autouse=True)
def nothing_kept() -> Iterator[None]:
    forget()
    yield
    forget()


def sizes() -> list[int]:
    """Return the bytes of each memory that is kept."""
    return [each.storage.nbytes() for each in room._kept]


def gradient(seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the gradient of a head's weight, ``LEAST`` bytes at least."""
    draw, width = torch.Generator().manual_seed(seed), 64
    weight = torch.randn(8192, width, generator=draw).to(dtype).requires_grad_()
    loss, _ = reduce(
        torch.randn(64, width, generator=draw).to(dtype), Head(weight), torch.arange(64),
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


def test_the_storage_alone_holds_it_as_well() -> None:
    storage = room_for(PLAIN, (COUNT,), torch.float32).fill_(7.0).untyped_storage()
    room_for(PLAIN, (COUNT,), torch.float32).zero_()
    assert storage[:4].tolist() == torch.tensor([7.0]).view(torch.uint8).tolist()


def test_what_another_process_may_hold_is_never_lent_again() -> None:
    room_for(PLAIN, (COUNT,), torch.float32).share_memory_()
    room_for(PLAIN, (COUNT,), torch.float32)
    assert [each.storage.is_shared() for each in room._kept] == [False]


def test_what_is_gone_is_lent_again() -> None:
    gradient(0)
    before = sizes()
    gradient(1)
    assert sizes() == before
    assert {each.loan for each in room._kept} <= {room._loans, room._loans - 1}


def test_memory_of_another_size_or_type_is_lent_up_to_half_empty() -> None:
    room_for(PLAIN, (COUNT, 2), torch.float32)
    for count, dtype in ((COUNT, torch.float64), (COUNT, torch.float32)):
        room_for(PLAIN, (count,), dtype)
    assert sizes() == [2 * LEAST]
    room_for(PLAIN, (COUNT, 5), torch.float32)
    assert sizes() == [2 * LEAST, 5 * LEAST]


def test_new_memory_takes_the_place_of_one_that_it_serves_for() -> None:
    room_for(PLAIN, (COUNT, 2), torch.float32)
    held = room_for(PLAIN, (COUNT, 2), torch.float32)
    room_for(PLAIN, (COUNT, 3), torch.float32)  # nobody's to give: the only one is held
    assert sizes() == [2 * LEAST, 3 * LEAST]
    del held
    room_for(PLAIN, (COUNT, 4), torch.float32, exact=True)  # a gradient's: no buffer goes for it
    assert sizes() == [2 * LEAST, 3 * LEAST, 4 * LEAST]
    forget()
    room_for(PLAIN, (COUNT, 2), torch.float32)
    room_for(PLAIN, (COUNT, 4), torch.float32)
    assert sizes() == [4 * LEAST]


def test_a_gradient_has_memory_of_its_very_size() -> None:
    """Whoever saves it saves its storage."""
    lent = [room_for(PLAIN, (8192, 96), torch.float32) for _ in range(2)]
    del lent  # one serves as the buffer of logits, and the other is there
    found = gradient(0)
    assert found.untyped_storage().nbytes() == found.nbytes
    assert not found._is_view()


def test_it_becomes_grad_without_a_copy() -> None:
    found = gradient(0)
    assert found.data_ptr() in [each.storage.data_ptr() for each in room._kept]


def test_gradients_of_as_many_rows_as_never_again_are_not_kept() -> None:
    """Every batch has another number of tokens. Seen to fail: sixteen of them held as much as a large head."""
    weight, peaks = torch.randn(300, 512), []
    for rows in range(1000, 1300, 50):
        hidden = torch.randn(rows, 512, requires_grad=True)
        loss, _ = reduce(
            hidden, Head(weight), torch.zeros(rows, dtype=torch.int64),
            lambda scores, rows: scores["log_prob"].sum(), want=["log_prob"],
        )  # fmt: skip
        loss.backward()
        assert hidden.grad is not None
        assert hidden.grad.nbytes >= LEAST
        peaks.append(sum(sizes()))
    assert max(peaks) <= 2 * 1300 * 300 * 4  # the buffer of logits


def test_sums_that_are_cast_are_not_kept() -> None:
    gradient(0, dtype=torch.bfloat16)
    assert sizes() == [2 * 32 * 8192 * 4]  # the buffer of two chunks


def test_the_smallest_that_serves_is_lent() -> None:
    large, small = (room_for(PLAIN, (count,), torch.float32) for count in (2 * COUNT, COUNT + 8))
    place = small.data_ptr()
    del large, small
    assert room_for(PLAIN, (COUNT,), torch.float32).data_ptr() == place


def test_what_serves_nobody_is_freed() -> None:
    room_for(PLAIN, (8 * COUNT,), torch.float32)
    for _ in range(UNUSED):
        assert len(room._kept) <= 2
        room_for(PLAIN, (COUNT,), torch.float32)
    assert sizes() == [LEAST]


def test_memory_lent_in_inference_mode_may_be_trained_in_afterwards() -> None:
    with torch.inference_mode():
        room_for(PLAIN, (COUNT,), torch.float32)
    after = room_for(PLAIN, (COUNT,), torch.float32)
    assert sizes() == [LEAST]
    assert not after.is_inference()
    (after.zero_().requires_grad_() * 2).sum().backward()


def test_small_memory_and_what_a_mode_wants_to_see_are_left_to_pytorch() -> None:
    room_for(PLAIN, (COUNT - 1,), torch.float32)
    with FlopCounterMode(display=False):
        room_for(PLAIN, (COUNT,), torch.float32)
    assert room._kept == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing forks here")
def test_a_fork_does_not_wait_for_a_thread_that_it_has_not() -> None:
    """As a data loader's worker, made while a thread of the parent borrows."""
    code = f"""
import os, threading, torch
from kedge.head.room import room_for
torch.set_num_threads(1)

def borrow():
    while True:
        room_for(torch.ones(1), ({COUNT},), torch.float32)

for _ in range(2):
    threading.Thread(target=borrow, daemon=True).start()
for _ in range(10):
    child = os.fork()
    if child == 0:
        room_for(torch.ones(1), ({COUNT},), torch.float32)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
os._exit(0)
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=120, check=False).returncode == 0


def test_threads_do_not_share_a_chunk() -> None:
    truths = [gradient(seed).clone() for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            for found, true in zip(pool.map(gradient, range(4)), truths, strict=True):
                torch.testing.assert_close(found, true)
