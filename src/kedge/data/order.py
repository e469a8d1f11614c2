"""The order in which rows are visited."""

from __future__ import annotations

import random
from functools import lru_cache


class Order:
    """A fresh permutation of all rows in each pass, found by position.

    Position p is in pass p // count; the permutation of a pass depends on ``seed`` and the pass alone.
    A run that resumes needs the position and nothing else.

    Args:
        count: number of rows.
        seed: equal seeds give equal orders.

    Raises:
        ValueError: no rows, or a negative position.

    >>> from kedge.data import Order
    >>> order = Order(3, seed=0)
    >>> sorted(order[p] for p in range(3)) == sorted(order[p] for p in range(3, 6)) == [0, 1, 2]
    True
    """

    def __init__(self, count: int, seed: int) -> None:
        if count < 1:
            raise ValueError(f"an order needs at least one row, not {count}")
        self.count = count
        self.seed = seed

    def __getitem__(self, position: int) -> int:
        """Return the row at a position."""
        if position < 0:
            raise ValueError(f"positions count from 0, not {position}")
        return _permutation(self.count, self.seed, position // self.count)[position % self.count]


@lru_cache(maxsize=4)
def _permutation(count: int, seed: int, number: int) -> tuple[int, ...]:
    rows = list(range(count))
    random.Random(f"order/{seed}/{number}").shuffle(rows)
    return tuple(rows)
