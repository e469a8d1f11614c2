"""The decoding of one batch of prompts, from the first token to the end of its last response."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from kedge.head import Anchor, Head
from kedge.head.projection import row_width, write_logits
from kedge.rollout.cache import RolloutCache
from kedge.rollout.draw import draw
from kedge.rollout.engine import Rollout, SamplingConfig
from kedge.rollout.stop import StopStrings

_DROP_BELOW = 0.75
"""Finished rows leave once the live ones are at most this share of the batch: each drop copies the cache."""


class Batch:
    """What the decoding of a batch needs, apart from the prompts.

    Args:
        model: in evaluation mode.
        head: its output head, in the dtype of the logits, or in bfloat16 where that is multiplied as it is.
        eos_ids: tokens that end a response.
        sampling: how to draw.
        stops: stop strings, if any.
        uniforms: the random number of each response's each token.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        head: Head,
        eos_ids: Sequence[int],
        sampling: SamplingConfig,
        stops: StopStrings | None,
        uniforms: Float[Tensor, "R T"],
    ) -> None:
        self.backbone = model.get_decoder()
        self.head = head
        self.device = head.weight.device
        self.ends = torch.tensor([end for end in eos_ids if end < head.tokens], device=self.device)
        self.sampling = sampling
        self.stops = stops
        self.uniforms = uniforms

    def run(self, prompts: Sequence[Sequence[int]]) -> Rollout:
        """Read the prompts once, then add a token to every live response until none is left."""
        copies, limit = self.sampling.responses_per_prompt, self.sampling.max_new_tokens
        prompt_lengths = torch.tensor([len(prompt) for prompt in prompts], device=self.device)
        width, count = max(map(len, prompts)), len(prompts) * copies
        self.cache = RolloutCache(capacity=width + limit - 1)
        hidden = self._read(prompts, prompt_lengths).repeat_interleave(copies, dim=0)
        self.cache.expand(copies, prompt_lengths)
        self.padded = min(map(len, prompts)) < width
        if self.head.weight.dtype == torch.bfloat16 and hidden.dtype != torch.bfloat16:
            self.head = replace(self.head, weight=self.head.weight.float())
        dtype = torch.float64 if self.head.weight.dtype == torch.float64 else torch.float32
        room = hidden.new_empty(count, row_width(self.device.type, self.head.tokens), dtype=dtype)
        self.logits = room[:, : self.head.tokens]

        tokens = torch.zeros(count, limit, dtype=torch.long, device=self.device)
        log_probs = torch.zeros(count, limit, dtype=dtype, device=self.device)
        lengths = torch.full((count,), limit, device=self.device)
        finished = torch.zeros(count, dtype=torch.bool, device=self.device)
        rows = torch.arange(count, device=self.device)
        before = prompt_lengths.repeat_interleave(copies)
        for step in range(limit):
            drawn, log_prob = self._draw(hidden, rows, step)
            tokens[rows, step], log_probs[rows, step] = drawn, log_prob
            ended = torch.isin(drawn, self.ends)
            if self.stops is not None:
                ended |= self.stops.completed(tokens[rows, : step + 1])
            ended &= ~finished[rows]
            lengths[rows[ended]] = step + 1
            finished[rows[ended]] = True
            live = (~finished[rows]).nonzero()[:, 0]
            if step + 1 == limit or len(live) == 0:
                break
            if len(live) <= _DROP_BELOW * len(rows):
                self.cache.keep(live)
                rows, drawn = rows[live], drawn[live]
            hidden = self._extend(drawn, before[rows], width, step)
        return self._packed(prompts, prompt_lengths, tokens, log_probs, lengths, finished)

    def _read(self, prompts: Sequence[Sequence[int]], lengths: Tensor) -> Tensor:
        """Return the hidden state behind each prompt.

        Prompts are padded on the right, which needs no mask; the cache aligns their ends afterwards.
        """
        width = max(map(len, prompts))
        rows = [list(prompt) + [0] * (width - len(prompt)) for prompt in prompts]
        output = self.backbone(
            input_ids=torch.tensor(rows, device=self.device),
            position_ids=torch.arange(width, device=self.device)[None],
            past_key_values=self.cache,
            use_cache=True,
        )
        hidden: Tensor = output.last_hidden_state
        return hidden[torch.arange(len(prompts), device=self.device), lengths - 1]

    def _extend(self, tokens: Tensor, before: Tensor, width: int, step: int) -> Tensor:
        """Return the hidden state behind each response's newest token."""
        columns = torch.arange(width + step + 1, device=self.device)
        output = self.backbone(
            input_ids=tokens[:, None],
            attention_mask=(columns >= (width - before)[:, None]).long() if self.padded else None,
            position_ids=(before + step)[:, None],
            past_key_values=self.cache,
            use_cache=True,
        )
        hidden: Tensor = output.last_hidden_state[:, -1]
        return hidden

    def _draw(self, hidden: Tensor, rows: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Draw a token for each row, with its log-probability."""
        greedy = self.sampling.temperature == 0
        temperature = 1.0 if greedy else self.sampling.temperature
        logits = write_logits(Anchor(hidden, self.head), temperature, self.logits)
        if step < self.sampling.min_new_tokens:
            logits[:, self.ends] = -torch.inf
        return draw(logits, None if greedy else self.uniforms[rows, step])

    def _packed(
        self,
        prompts: Sequence[Sequence[int]],
        prompt_lengths: Tensor,
        tokens: Tensor,
        log_probs: Tensor,
        lengths: Tensor,
        finished: Tensor,
    ) -> Rollout:
        """Return the finished batch without its padding."""
        used = torch.arange(tokens.shape[1], device=self.device) < lengths[:, None]
        responses = tokens[used]
        groups = torch.arange(len(prompts), device=self.device)
        return Rollout(
            prompt_tokens=torch.tensor([token for prompt in prompts for token in prompt], device=self.device),
            prompt_lengths=prompt_lengths,
            response_tokens=responses,
            response_lengths=lengths,
            group=groups.repeat_interleave(self.sampling.responses_per_prompt),
            mask=torch.ones_like(responses, dtype=torch.bool),
            sampler_log_probs=log_probs[used],
            finished=finished,
        )
