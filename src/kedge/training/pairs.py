"""Preference pairs, encoded once, before the first step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from kedge.data import Rows, encode_pair
from kedge.errors import UserError


@dataclass(frozen=True)
class Pairs:
    """Encoded pairs: token ids of both sides, margins, and P(chosen ≻ rejected) where the judge is known."""

    chosen: Sequence[Int[Tensor, " _"]]
    rejected: Sequence[Int[Tensor, " _"]]
    margins: Float[Tensor, " P"]
    true_preference: Float[Tensor, " P"] | None = None

    def __len__(self) -> int:
        return len(self.chosen)

    def sequences(self, rows: Sequence[int]) -> list[Tensor]:
        """Give the chosen side of every row, then the rejected one of every row."""
        return [*(self.chosen[row] for row in rows), *(self.rejected[row] for row in rows)]

    def longer(self, row: int) -> int:
        """Give the tokens of a pair's longer side."""
        return max(len(self.chosen[row]), len(self.rejected[row]))


def encode_pairs(
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase,
    *,
    ends: Sequence[int] = (),
    limit: int | None,
    true_preference: Callable[..., Any] | None = None,
) -> tuple[Pairs, int]:
    """Encode pairs and leave out those with a side of over ``limit`` tokens; give how many those were.

    Raises:
        UserError: a row is no pair, every pair is too long, or the true preference is not one probability a pair.
    """
    encoded = [
        encode_pair(row, tokenizer, ends=ends, place=rows.place(index)) for index, row in enumerate(rows)
    ]
    kept = [
        index
        for index, pair in enumerate(encoded)
        if limit is None or max(len(pair.chosen), len(pair.rejected)) <= limit
    ]
    if not kept:
        raise UserError(
            f"{rows.source}: every pair has a side longer than {limit} tokens; raise max_tokens or the context"
        )
    known = None
    if true_preference is not None:
        known = _probabilities(true_preference, rows, kept)
    pairs = Pairs(
        [torch.tensor(encoded[index].chosen) for index in kept],
        [torch.tensor(encoded[index].rejected) for index in kept],
        torch.tensor([encoded[index].margin or 0.0 for index in kept]),
        known,
    )
    return pairs, len(encoded) - len(kept)


def _probabilities(function: Callable[..., Any], rows: Rows, kept: Sequence[int]) -> Float[Tensor, " P"]:
    """Ask what the true probabilities of the preferences are."""
    columns = [[rows[index][name] for index in kept] for name in ("prompt", "chosen", "rejected")]
    try:
        known = torch.tensor(function(*columns), dtype=torch.float64)
    except Exception as error:
        raise UserError(f"true_preference: {type(error).__name__}: {error}") from error
    if known.shape != (len(kept),) or not bool(((known >= 0) & (known <= 1)).all()):
        raise UserError("true_preference must return one probability, from 0 to 1, for each pair")
    return known
