"""Prompts, encoded once, before the first step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from kedge.data import Rows, encode_prompt
from kedge.errors import UserError


@dataclass(frozen=True)
class Prompts:
    """Prompts as token ids, as reward functions see them, and the other columns of their rows."""

    tokens: list[list[int]]
    shown: list[Any]
    rows: list[dict[str, Any]]

    def __len__(self) -> int:
        return len(self.tokens)

    def as_completion(self, row: int, text: str) -> Any:
        """Give a completion in the prompt's kind: text for text, a list of one message for messages."""
        return [{"role": "assistant", "content": text}] if isinstance(self.shown[row], list) else text

    @property
    def column_names(self) -> list[str]:
        """The rows' columns that reward functions are called with: all but prompt and completion."""
        own = ("prompt", "completion", "prompts", "completions")
        return [name for name in self.rows[0] if name not in own]

    def columns(self, rows: Sequence[int]) -> dict[str, list[Any]]:
        """Columns of some rows for the reward functions."""
        return {name: [self.rows[row].get(name) for row in rows] for name in self.column_names}


def encode_prompts(
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase,
    *,
    context: int | None,
    max_new_tokens: int,
    max_prompt_tokens: int | None = None,
) -> tuple[Prompts, int]:
    """Encode prompts, leave out those over ``max_prompt_tokens`` and give how many; the rest must fit the context."""
    encoded = [encode_prompt(row, tokenizer, place=rows.place(index)) for index, row in enumerate(rows)]
    kept = [i for i, ids in enumerate(encoded) if max_prompt_tokens is None or len(ids) <= max_prompt_tokens]
    if not kept:
        raise UserError(
            f"{rows.source}: every prompt is longer than {max_prompt_tokens} tokens; raise max_prompt_tokens"
        )
    for index in kept:
        if context is not None and len(encoded[index]) + max_new_tokens > context:
            raise UserError(
                f"{rows.place(index)}: the prompt has {len(encoded[index])} tokens, which with max_new_tokens "
                f"({max_new_tokens}) is beyond the model's context of {context}: shorten the prompt, leave such "
                "prompts out with rollout.max_prompt_tokens, or lower rollout.max_new_tokens"
            )
    prompts = Prompts([encoded[i] for i in kept], [rows[i]["prompt"] for i in kept], [rows[i] for i in kept])
    return prompts, len(rows) - len(kept)
