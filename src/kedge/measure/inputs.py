"""What two models are compared on: prompts, or texts, as tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from kedge.data import Rows, encode_example, encode_prompt, format_rows, load_rows, names_dataset
from kedge.errors import UserError
from kedge.measure.config import Given, MeasureConfig

SHOWN = 500
"""Characters of a prompt or text that are kept for people."""
LONGEST_WINDOW = 2048
"""Tokens of a window where none is given: contexts of 100,000 tokens would need more memory than most have."""


@dataclass(frozen=True)
class Window:
    """A piece of text that goes through the models at once.

    Attributes:
        cluster: the prompt or text, by its place in the data.
        context: ids that are read and not scored; at least one.
        scored: ids whose distributions are compared; none for a prompt.
    """

    cluster: int
    context: list[int]
    scored: list[int]


def load_prompts(
    given: Given, tokenizer: PreTrainedTokenizerBase, config: MeasureConfig, context: int | None
) -> list[Window]:
    """Encode prompts by the reference's tokenizer, once for both models.

    Raises:
        UserError: no prompts, an empty one, one that leaves no room for its response; naming file and line.
    """
    rows = format_rows(_rows(given, "prompt", config), prompt=config.prompt)
    windows = []
    for index, row in enumerate(rows):
        tokens = encode_prompt(row, tokenizer, place=rows.place(index))
        if context is not None and len(tokens) + config.max_new_tokens > context:
            raise UserError(
                f"{rows.place(index)}: the prompt has {len(tokens)} tokens, which with max_new_tokens "
                f"({config.max_new_tokens}) is beyond the models' context of {context}: shorten or leave out the "
                "prompt, or lower max_new_tokens"
            )
        windows.append(Window(index, tokens, []))
    return windows


def load_texts(
    given: Given,
    tokenizer: PreTrainedTokenizerBase,
    config: MeasureConfig,
    context: int | None,
    ends: Sequence[int] = (),
) -> list[Window]:
    """Encode texts by the reference's tokenizer, once for both models.

    Of a text every token but the first is scored, once. One that is longer than a window is read in several: each
    but the first scores at most half of its tokens and reads the ones before them, and all begin as the text does
    where that is with a bos token. Of messages, or prompt and completion, the answer is scored, in one window, with
    its end.

    Raises:
        UserError: no texts, one without a token to score, an example or a window beyond the context; naming file and
            line.
    """
    length = window_length(config, context)
    rows = _rows(given, config.text, config)
    windows = []
    for index, row in enumerate(rows):
        place = rows.place(index)
        if config.text not in row and ("messages" in row or "completion" in row):
            (example,) = format_rows(Rows([row], place))
            tokens, scored = encode_example(example, tokenizer, ends=ends, context=context, place=place)
            first = scored.index(True)
            windows.append(Window(index, tokens[:first], tokens[first:]))
            continue
        if not isinstance(row.get(config.text), str):
            raise UserError(
                f"{place}: no text in column {config.text!r}; its columns: {', '.join(row) or 'none'}. Name "
                "the column with text=, or give messages, or prompt and completion"
            )
        tokens = encode_prompt({"prompt": row[config.text]}, tokenizer, place=place)
        if len(tokens) < 2:
            raise UserError(
                f"{place}: the text has a single token; the first is only read, so none is scored"
            )
        windows += _windows(index, tokens, length, tokenizer.bos_token_id)
    return windows


def window_length(config: MeasureConfig, context: int | None) -> int:
    """Say how many tokens of a text go through the models at once.

    Raises:
        UserError: more than their context was asked for.
    """
    if config.window is None:
        return LONGEST_WINDOW if context is None else min(LONGEST_WINDOW, context)
    if context is not None and config.window > context:
        raise UserError(
            f"window = {config.window} is beyond the models' context of {context}: lower it, or leave it out"
        )
    return config.window


def _windows(cluster: int, tokens: list[int], length: int, bos: int | None) -> list[Window]:
    windows = [Window(cluster, tokens[:1], tokens[1:length])]
    for start in range(length, len(tokens), length // 2):
        scored = tokens[start : start + length // 2]
        read = tokens[start + len(scored) - length : start]
        windows.append(Window(cluster, [bos, *read[1:]] if bos == tokens[0] else read, scored))
    return windows


def _rows(given: Given, column: str, config: MeasureConfig) -> Rows:
    if isinstance(given, str | Path):
        return load_rows(given, split=config.split if names_dataset(given) else None, count=config.count)
    rows = Rows(
        [{column: row} if isinstance(row, str) else dict(row) for row in given], f"the {column}s given"
    )
    if not rows:
        raise UserError(f"no {column}s were given")
    return rows.first(config.count)
