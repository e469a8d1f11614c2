"""Preference pairs: one prompt, the response that was preferred, the one that was not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kedge.data.encode import encode_example
from kedge.data.rows import Row, Rows
from kedge.data.template import DEFAULT_PROMPT, Text, check_messages, fill_formats
from kedge.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SIDES = ("chosen", "rejected")


@dataclass(frozen=True)
class Pair:
    """A pair as tokens: prompt and response of each side, with their end."""

    chosen: list[int]
    rejected: list[int]
    margin: float | None
    """By how much the scores should differ; None where the data do not say."""


def format_pairs(
    rows: Rows, *, prompt: str = DEFAULT_PROMPT, chosen: str = "{chosen}", rejected: str = "{rejected}"
) -> Rows:
    """Fill the formats with the columns of every row; see `kedge.data.format_rows`.

    Where both sides are whole conversations, as chat data often have them, and the prompt's format is the default,
    what they share before their last message is the prompt.

    Args:
        rows: as `load_rows` gives them.
        prompt: how a row becomes a prompt.
        chosen: how it becomes the preferred response.
        rejected: how it becomes the other one.

    Returns:
        The rows, each with ``prompt``, ``chosen`` and ``rejected``, beside its own columns.

    Raises:
        UserError: as `format_rows`; conversations that part before their last message.

    >>> from kedge.data import Rows, format_pairs
    >>> user, good, bad = ({"role": role, "content": text} for role, text in
    ...     (("user", "2+2?"), ("assistant", "4"), ("assistant", "5")))
    >>> row, = format_pairs(Rows([{"chosen": [user, good], "rejected": [user, bad]}]))
    >>> row["prompt"] == [user], row["chosen"] == [good]
    (True, True)
    """
    if prompt == DEFAULT_PROMPT:
        rows = rows.with_rows(_split_conversations(row, rows.place(index)) for index, row in enumerate(rows))
    return fill_formats(rows, {"prompt": prompt, "chosen": chosen, "rejected": rejected})


def _split_conversations(row: Row, place: str) -> Row:
    """Take the prompt out of two whole conversations; leave every other row as it is."""
    sides = [row.get(side) for side in _SIDES]
    if not all(isinstance(side, list) and len(side) > 1 for side in sides):
        return row
    chosen, rejected = (
        check_messages(side, f"{place}, column {name!r}") for side, name in zip(sides, _SIDES, strict=True)
    )
    before, given = chosen[:-1], row.get("prompt")
    if rejected[:-1] != before:
        raise UserError(
            f"{place}: the conversations in 'chosen' and 'rejected' part before their last message, so they answer "
            "different prompts; a pair shares its prompt"
        )
    if given is not None and given != before and given != before[-1]["content"]:
        raise UserError(
            f"{place}: 'chosen' and 'rejected' hold whole conversations, which begin otherwise than the column "
            "'prompt'; leave out one of the two"
        )
    return {**row, "prompt": before, "chosen": chosen[-1:], "rejected": rejected[-1:]}


def encode_pair(
    row: Row, tokenizer: PreTrainedTokenizerBase, *, ends: Sequence[int] = (), place: str = "the row"
) -> Pair:
    """Turn a row into a pair of sequences: prompt, response, end of text, as in supervised fine-tuning.

    Args:
        row: with ``prompt``, ``chosen``, ``rejected``, all text or all messages (or messages with the text of one
            answer), and ``margin`` where the data have one.
        tokenizer: of the model.
        ends: ids that end a response; see :func:`kedge.data.encode_example`.
        place: file and line, for error messages.

    Raises:
        UserError: a column is missing, empty or does not fit; both responses are the same; the margin is no number.

    >>> from kedge.data import encode_pair
    >>> from kedge.tasks import sums
    >>> encode_pair({"prompt": "1+2=", "chosen": "#3", "rejected": "#4"}, sums.tokenizer()).rejected
    [3, 12, 4, 13, 15, 6, 1]
    """
    for side in _SIDES:
        if side not in row:
            raise UserError(f"{place}: no column {side!r}; its columns: {', '.join(row) or 'none'}")
        if _empty(row[side]):
            raise UserError(f"{place}: {side!r} is empty; a pair needs two responses, remove the row")
    if row["chosen"] == row["rejected"]:
        raise UserError(
            f"{place}: 'chosen' and 'rejected' are the same text, so there is nothing to prefer; remove the row"
        )
    encoded = {
        side: encode_example(
            {**row, "completion": row[side]}, tokenizer, ends=ends, place=f"{place}, {side}"
        )[0]
        for side in _SIDES
    }
    if encoded["chosen"] == encoded["rejected"]:
        raise UserError(
            f"{place}: 'chosen' and 'rejected' are different texts of the same tokens, so no model can tell them "
            "apart; remove the row"
        )
    return Pair(encoded["chosen"], encoded["rejected"], _margin(row, place))


def _empty(response: Text) -> bool:
    text: Any = response[-1].get("content") if isinstance(response, list) and response else response
    return text is None or (isinstance(text, str | list) and len(text) == 0)


def _margin(row: Row, place: str) -> float | None:
    if row.get("margin") is None:
        return None
    value = row["margin"]
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise UserError(
            f"{place}: margin is {value!r}; it must be a number of 0 or more, or null (by how much the scores should "
            "differ)"
        )
    return float(value)
