"""What two models are compared on: prompts, or texts, as tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from transformers import PreTrainedTokenizerBase

from kedge.data import Rows, encode_example, encode_prompt, format_rows, load_rows
from kedge.errors import UserError
from kedge.measure.config import MeasureConfig

Given: TypeAlias = str | Path | Sequence[str | Mapping[str, Any]]
SHOWN = 500
"""Characters of a prompt or text that are kept for people."""


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
    given: Given, tokenizer: PreTrainedTokenizerBase, config: MeasureConfig, context: int | None
) -> list[Window]:
    """Encode texts by the reference's tokenizer, once for both models.

    Of a text every token but the first is scored; one that is longer than the context is cut into windows of
    that length, the first token of each only read. Of messages, or prompt and completion, the answer is scored.

    Raises:
        UserError: no texts, one without a token to score, an example beyond the context; naming file and line.
    """
    rows = _rows(given, config.text, config)
    windows = []
    for index, row in enumerate(rows):
        place = rows.place(index)
        if config.text not in row and ("messages" in row or "completion" in row):
            (example,) = format_rows(Rows([row], place))
            tokens, scored = encode_example(example, tokenizer, context=context, place=place)
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
        step = context or len(tokens)
        starts = range(0, len(tokens), step)
        pieces = [tokens[start : start + step] for start in starts]
        windows += [Window(index, piece[:1], piece[1:]) for piece in pieces if len(piece) > 1]
    return windows


def _rows(given: Given, column: str, config: MeasureConfig) -> Rows:
    if isinstance(given, str | Path):
        return load_rows(given, count=config.count)
    rows = Rows(
        [{column: row} if isinstance(row, str) else dict(row) for row in given], f"the {column}s given"
    )
    if not rows:
        raise UserError(f"no {column}s were given")
    return rows.first(config.count)
