"""A reward model as a reward: responses in, scores out, in evaluation mode, without gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kedge.data import encode_example
from kedge.errors import UserError
from kedge.models import context_length
from kedge.training.config import ComputeConfig
from kedge.training.resources import load_scorer
from kedge.training.scoring import scored_sequences


@dataclass
class ModelReward:
    """A reward model, called as reward functions are, with the responses' tokens beside their texts.

    A response is scored as it was drawn: its own tokens, with an end token where it has ended. Where the
    reward model has another tokenizer than the policy, prompt and completion go through their texts instead.
    """

    name: str
    source: str | Path
    """A folder, or a name on the hub."""
    policy_tokenizer: PreTrainedTokenizerBase
    end_ids: tuple[int, ...]
    """Tokens of the policy that end a response."""
    compute: ComputeConfig
    """Of the stage; ``micro_batch`` is its own."""
    model: PreTrainedModel | None = None
    tokenizer: PreTrainedTokenizerBase | None = field(default=None, init=False)
    """Of the reward model, where it is another one than the policy's."""

    def load(self, device: torch.device, dtype: torch.dtype) -> None:
        """Read the model, frozen and in evaluation mode.

        Raises:
            UserError: it is missing, no sequence classifier with one label, or has no usable tokenizer.
            RunError: its files are damaged, or the hub cannot be reached.
        """
        model, tokenizer = load_scorer(self.source, dtype)
        self.tokenizer = None if same_tokens(tokenizer, self.policy_tokenizer) else tokenizer
        self.model = model.requires_grad_(False).eval().to(device)

    def unload(self) -> None:
        """Forget the model."""
        self.model = None

    def require_room(self, tokens: int) -> None:
        """Refuse sequences that the reward model has no context for.

        Args:
            tokens: of the longest prompt and response, as the policy counts them.

        Raises:
            UserError: they are too long, where both count the same.
        """
        assert self.model is not None
        context = context_length(self.model)
        if self.tokenizer is None and context is not None and tokens > context:
            raise UserError(
                f"reward model {self.name!r} has a context of {context} tokens, and prompt and response can have "
                f"{tokens}: lower rollout.max_new_tokens or rollout.max_prompt_tokens, or take another reward model"
            )

    @torch.no_grad()
    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        prompt_ids: Sequence[list[int]],
        completion_ids: Sequence[list[int]],
    ) -> list[float]:
        """Score responses, those of like length together."""
        assert self.model is not None, "it is loaded before its stage begins"
        sequences = [
            torch.tensor(self._tokens(*response, f"reward model {self.name!r}, response {index}"))
            for index, response in enumerate(
                zip(prompts, completions, prompt_ids, completion_ids, strict=True)
            )
        ]
        order = sorted(range(len(sequences)), key=lambda index: len(sequences[index]))
        scores = torch.empty(len(sequences), dtype=torch.float64)
        for start in range(0, len(order), self.compute.micro_batch):
            part = order[start : start + self.compute.micro_batch]
            found = scored_sequences(self.model, [sequences[index] for index in part], self.compute)
            scores[part] = found.double().cpu()
        values: list[float] = scores.tolist()
        return values

    def _tokens(
        self, prompt: Any, completion: Any, prompt_ids: list[int], completion_ids: list[int], place: str
    ) -> list[int]:
        if self.tokenizer is None:
            return [*prompt_ids, *completion_ids]
        tokens, _ = encode_example({"prompt": prompt, "completion": completion}, self.tokenizer, place=place)
        ended = bool(completion_ids) and completion_ids[-1] in self.end_ids
        return tokens if ended else tokens[:-1]


def same_tokens(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    """Whether two tokenizers turn prompts and responses into the same tokens, as far as their settings tell.

    >>> from kedge.tasks import prose, sums
    >>> same_tokens(sums.tokenizer(), sums.tokenizer()), same_tokens(sums.tokenizer(), prose.tokenizer())
    (True, False)
    """

    def settings(tokenizer: PreTrainedTokenizerBase) -> tuple[Any, ...]:
        return (
            tokenizer.get_vocab(),
            tokenizer.eos_token_id,
            tokenizer("")["input_ids"],  # what it puts before and behind a text
            getattr(tokenizer, "chat_template", None),
        )

    return settings(one) == settings(other)
