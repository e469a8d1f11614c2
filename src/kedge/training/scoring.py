"""Passes of a model over packed responses: hidden states, and scores without gradients."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from kedge.head import Head, score
from kedge.models import head_of, hidden_states, response_states, sequence_scores, shares_prompts
from kedge.rollout import Rollout
from kedge.training.config import ComputeConfig

_SPARED = 0.1
"""The share of all tokens from which on reading prompts once pays for the second pass that it takes."""


@dataclass(frozen=True)
class Scorer:
    """How models are run over responses in a stage."""

    compute: ComputeConfig
    temperature: float
    vocabulary: int | None
    """Rows of the head that are tokens; None: all."""
    backend: str = "chunked"
    """Of the head."""

    @property
    def options(self) -> dict[str, Any]:
        """How the head is called."""
        return {
            "temperature": self.temperature,
            "backend": self.backend,
            "chunk_rows": self.compute.head_chunk_rows,
        }

    def head(self, model: PreTrainedModel) -> Head:
        """Give a model's head, without the padding of its vocabulary."""
        return head_of(model, vocabulary=self.vocabulary)

    def hidden(self, model: PreTrainedModel, rollout: Rollout) -> Float[Tensor, "N H"]:
        """Hidden states that predict the response tokens, in one pass; of prompts with several responses, in two."""
        with arithmetic(model, self.compute.precision):
            if self.compute.layout == "padded" and _pays(rollout) and shares_prompts(model):
                return response_states(
                    model,
                    rollout.prompt_tokens,
                    rollout.prompt_lengths,
                    rollout.response_tokens,
                    rollout.response_lengths,
                    rollout.group,
                )
            tokens, lengths = rollout.sequences()
            hidden = hidden_states(model, tokens, lengths, layout=self.compute.layout)
        return hidden[rollout.predicting()]

    @torch.no_grad()
    def hidden_in_parts(
        self, model: PreTrainedModel, rollout: Rollout, responses: int | None = None
    ) -> Float[Tensor, "N H"]:
        """The same without gradients, a micro-batch at a time."""
        size = responses or self.compute.micro_batch
        return torch.cat([self.hidden(model, part) for _, part in parts(rollout, size)])

    @torch.no_grad()
    def scores(
        self,
        hidden: Float[Tensor, "N H"],
        head: Head,
        rollout: Rollout,
        anchors: Mapping[str, tuple[Tensor, Head]],
        want: Collection[str],
    ) -> dict[str, Float[Tensor, " N"]]:
        """Per-token scores of the responses, without gradients."""
        return score(
            hidden,
            head,
            rollout.response_tokens,
            anchors=anchors,
            want=want,
            **self.options,
        )


def _pays(rollout: Rollout) -> bool:
    """Whether enough tokens are prompts that would be read again."""
    spared = int(rollout.prompt_lengths[rollout.group].sum() - rollout.prompt_lengths.sum())
    return spared >= _SPARED * (spared + len(rollout.prompt_tokens) + len(rollout.response_tokens))


def arithmetic(model: PreTrainedModel, precision: str) -> torch.autocast:
    """The precision of the transformer blocks, the same for sampler and trainer."""
    return torch.autocast(model.device.type, torch.bfloat16, enabled=precision == "bfloat16")


def parts(rollout: Rollout, responses: int) -> Iterator[tuple[slice, Rollout]]:
    """Cut a rollout into runs of responses; give the rows of their tokens with each."""
    count = len(rollout.group)
    ends = [0, *rollout.response_lengths.cumsum(0).tolist()]
    for start in range(0, count, responses):
        stop = min(start + responses, count)
        index = torch.arange(start, stop, device=rollout.group.device)
        yield slice(ends[start], ends[stop]), rollout.select(index)


def scored_sequences(
    model: PreTrainedModel, sequences: Sequence[Int[Tensor, " _"]], compute: ComputeConfig
) -> Float[Tensor, " R"]:
    """Scores of a reward model on some sequences, in one pass."""
    tokens = torch.cat(list(sequences)).to(model.device)
    lengths = torch.tensor([len(each) for each in sequences], device=model.device)
    with arithmetic(model, compute.precision):
        return sequence_scores(model, tokens, lengths, layout=compute.layout)
