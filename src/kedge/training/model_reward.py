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
from kedge.models import context_length, special_tokens
from kedge.rewards import RewardError
from kedge.training.config import ComputeConfig
from kedge.training.resources import load_scorer
from kedge.training.scoring import scored_sequences


@dataclass
class ModelReward:
    """A reward model, called as reward functions are, with the responses' tokens beside their texts.

    A response is scored as it was drawn: its own tokens, and an end token behind one that a stop string ended.
    Where the reward model has another tokenizer than the policy, prompt and completion go through their texts instead.
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
        completion_finished: Sequence[bool],
    ) -> list[float]:
        """Score responses, those of like length together.

        Raises:
            RewardError: one cannot be read by the reward model.
        """
        assert self.model is not None, "it is loaded before its stage begins"
        sequences = [
            torch.tensor(self._read(index, *response))
            for index, response in enumerate(
                zip(prompts, completions, prompt_ids, completion_ids, completion_finished, strict=True)
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

    def _read(
        self,
        index: int,
        prompt: Any,
        completion: Any,
        prompt_ids: list[int],
        completion_ids: list[int],
        finished: bool,
    ) -> list[int]:
        """Give the tokens that are scored; what cannot be is the failure of this response alone."""
        answered = f"reward model {self.name!r}, response to {prompt!r:.60}"
        assert self.model is not None
        if self.tokenizer is not None:
            row = {"prompt": prompt, "completion": completion}
            try:
                tokens, _ = encode_example(
                    row, self.tokenizer, ends=special_tokens(self.model, self.tokenizer)[1], place=answered
                )
            except UserError as error:
                raise RewardError(str(error), self.name, sample=index) from error
            tokens = tokens if finished else tokens[:-1]
        else:
            by_stop_string = finished and completion_ids[-1] not in self.end_ids
            tokens = [*prompt_ids, *completion_ids, *(self.end_ids[:1] if by_stop_string else ())]
        context = context_length(self.model)
        if context is not None and len(tokens) > context:
            raise RewardError(
                f"{answered}: {len(tokens)} tokens with its prompt, and its context is {context}: lower "
                "rollout.max_new_tokens, take a reward model of longer context, or leave such responses unscored with "
                "rewards.on_error: drop",
                self.name,
                sample=index,
            )
        return tokens


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
