"""Examples for supervised fine-tuning, encoded once, before the first step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from kedge.data import Rows, encode_example
from kedge.errors import UserError


@dataclass(frozen=True)
class Examples:
    """Encoded examples: token ids, which of them are learnt, and the true log-probability where it is known."""

    tokens: Sequence[Int[Tensor, " _"]]
    targets: Sequence[Bool[Tensor, " _"]]
    true_log_prob: Sequence[float] | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    def batch(self, rows: Sequence[int], device: torch.device) -> ExampleBatch:
        """Pack some examples end to end."""
        tokens = torch.cat([self.tokens[row] for row in rows])
        lengths = torch.tensor([len(self.tokens[row]) for row in rows])
        learnt = torch.cat([self.targets[row] for row in rows])
        positions = torch.nonzero(learnt).flatten()
        return ExampleBatch(
            tokens.to(device), lengths.to(device), (positions - 1).to(device), tokens[positions].to(device)
        )


@dataclass(frozen=True)
class ExampleBatch:
    """S packed tokens of R examples and the N of them that are targets."""

    tokens: Int[Tensor, " S"]
    lengths: Int[Tensor, " R"]
    predicting: Int[Tensor, " N"]
    """Positions whose hidden states predict the targets."""
    targets: Int[Tensor, " N"]


def encode_examples(
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase,
    *,
    ends: Sequence[int] = (),
    completion_only: bool,
    limit: int | None,
    true_log_prob: Callable[..., Any] | None = None,
) -> tuple[Examples, int]:
    """Encode examples and leave out those over ``limit`` tokens; give how many those were."""
    encoded = [
        encode_example(row, tokenizer, ends=ends, completion_only=completion_only, place=rows.place(index))
        for index, row in enumerate(rows)
    ]
    kept = [index for index, (tokens, _) in enumerate(encoded) if limit is None or len(tokens) <= limit]
    if not kept:
        raise UserError(
            f"{rows.source}: every example is longer than {limit} tokens; raise max_tokens or the context"
        )
    known = None
    if true_log_prob is not None:
        known = _log_probs(true_log_prob, rows, kept)
    examples = Examples(
        [torch.tensor(encoded[index][0]) for index in kept],
        [torch.tensor(encoded[index][1], dtype=torch.bool) for index in kept],
        known,
    )
    return examples, len(encoded) - len(kept)


def _log_probs(function: Callable[..., Any], rows: Rows, kept: Sequence[int]) -> list[float]:
    """Ask what the true log-probabilities of the completions are."""
    columns = [[rows[index][name] for index in kept] for name in ("prompt", "completion")]
    try:
        known = [float(value) for value in function(*columns)]
    except Exception as error:
        raise UserError(f"true_log_prob: {type(error).__name__}: {error}") from error
    if len(known) != len(kept) or not all(value <= 0 for value in known):
        raise UserError("true_log_prob must return one log-probability, of at most 0, for each completion")
    return known
