from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kedge.data import Order


@given(count=st.integers(1, 60), seed=st.integers(0, 2**40), number=st.integers(0, 50))
def test_each_pass_visits_every_row_once(count: int, seed: int, number: int) -> None:
    order = Order(count, seed)
    rows = [order[number * count + i] for i in range(count)]
    assert sorted(rows) == list(range(count))


def test_passes_and_seeds_differ() -> None:
    def first(seed: int, number: int) -> list[int]:
        order = Order(100, seed)
        return [order[number * 100 + i] for i in range(100)]

    assert first(0, 0) != first(0, 1) != first(1, 1)
    assert first(0, 0) != list(range(100))


def test_the_order_needs_the_position_alone() -> None:
    forwards = [Order(7, seed=3)[position] for position in range(40)]
    backwards = [Order(7, seed=3)[position] for position in reversed(range(40))]
    assert forwards == backwards[::-1]


def test_another_process_finds_the_same_order() -> None:
    program = "from kedge.data import Order; order = Order(50, 9); print([order[p] for p in range(120)])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    order = Order(50, 9)
    assert done.stdout.strip() == str([order[p] for p in range(120)])


def test_nothing_to_order_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one row"):
        Order(0, 1)
    with pytest.raises(ValueError, match="from 0"):
        Order(3, 1)[-1]
