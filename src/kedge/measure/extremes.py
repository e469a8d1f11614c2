"""The places where two models differ most."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from kedge.measure.pieces import Pieces
from kedge.measure.table import TokenTable

CONTEXT = 32
"""Tokens shown before a place; 8 after it."""


def most_moved(
    table: TokenTable, pieces: Pieces, most: int, context: Callable[[int, int], list[int]]
) -> dict[str, list[dict[str, Any]]]:
    """List the tokens that moved most, with their context.

    Args:
        table: tokens of a question, in the order of responses and positions.
        pieces: texts of tokens.
        most: how many in each list.
        context: what is read before a response, by the number of its cluster and its own.

    Returns:
        ``reverse_kl`` and ``forward_kl``: the largest KLs; ``raised`` and ``lowered``: where the policy gives
        the token a higher, a lower log-probability than the reference.
    """
    change = table.policy_log_prob.double() - table.reference_log_prob
    orders = {
        "reverse_kl": table.reverse_kl,
        "forward_kl": table.forward_kl,
        "raised": change,
        "lowered": -change,
    }
    return {
        name: [_place(table, pieces, context, i) for i in _largest(by, most)] for name, by in orders.items()
    }


def _largest(values: Tensor, most: int) -> list[int]:
    """Rows of the largest values above 0, ties in their order; NaN has no place."""
    order = values.nan_to_num(nan=0.0, posinf=math.inf).argsort(descending=True, stable=True)[:most]
    return [int(row) for row in order if values[row] > 0]


def _place(
    table: TokenTable, pieces: Pieces, context: Callable[[int, int], list[int]], row: int
) -> dict[str, Any]:
    cluster, response = int(table.cluster[row]), int(table.response[row])
    first, last = row, row + 1
    while first > 0 and row - first < CONTEXT and int(table.response[first - 1]) == response:
        first -= 1
    while last < table.count and last - row <= 8 and int(table.response[last]) == response:
        last += 1
    spare = CONTEXT - (row - first)
    read = context(cluster, response)[-spare:] if spare > 0 else []
    texts = pieces.of(read + table.token[first:last].tolist())
    place = len(read) + row - first
    return {
        "cluster": cluster,
        "response": response,
        "position": int(table.position[row]),
        "before": "".join(texts[:place]),
        "token": texts[place],
        "after": "".join(texts[place + 1 :]),
        "reverse_kl": float(table.reverse_kl[row]),
        "forward_kl": float(table.forward_kl[row]),
        "policy_log_prob": float(table.policy_log_prob[row]),
        "reference_log_prob": float(table.reference_log_prob[row]),
        "policy_top": pieces.alone(int(table.policy_top[row])),
        "reference_top": pieces.alone(int(table.reference_top[row])),
    }
