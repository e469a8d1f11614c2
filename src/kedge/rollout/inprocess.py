"""Responses drawn by the model itself, in this process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kedge.errors import UserError
from kedge.head.projection import suits
from kedge.models import context_length, evaluating, fast_linears, head_of, special_tokens, usable_vocabulary
from kedge.rollout.batch import Batch
from kedge.rollout.cache import require_cacheable
from kedge.rollout.engine import Rollout, SamplingConfig, concatenate
from kedge.rollout.stop import StopStrings


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingConfig,
    generator: torch.Generator,
    *,
    batch_size: int | None = None,
) -> Rollout:
    """Draw G responses to each prompt from softmax(logits / temperature).

    Each prompt is read once for its G responses; finished rows leave the batch; the batch ends with its last
    response. A token is drawn by inverting the cumulative distribution at one uniform number, and the
    numbers of the whole rollout are drawn beforehand, so a response depends on the seed and its place
    alone, not on ``batch_size``, padding, or when its neighbours end (up to rounding). Dropout is off; the
    model's mode is restored. Under ``torch.autocast`` the backbone follows it, the logits do not: they are
    float32 at least.

    Args:
        model: any causal language model with a key-value cache; the rollout is on its device.
        tokenizer: for end tokens, stop strings and the number of usable tokens.
        prompts: token ids of the B prompts.
        sampling: how to draw.
        generator: source of the uniform numbers, on any device; the same state gives the same rollout.
        batch_size: prompts at a time; all if not given.

    Returns:
        R = B · G responses, those of a prompt together. ``sampler_log_probs`` are exact for the
        distribution drawn from: tempered, over usable tokens, without end tokens while ``min_new_tokens``
        forbids them.

    Raises:
        UserError: no prompts, an empty prompt, a token outside the vocabulary, a prompt that leaves no room
            for its response; a model without end token or key-value cache.

    >>> from kedge.models import build_model, train_bpe
    >>> tokenizer = train_bpe(["a b c"], 258)
    >>> model = build_model(258, hidden_size=8, layers=1, heads=2, context=16, seed=0)
    >>> sampling = SamplingConfig(responses_per_prompt=3, max_new_tokens=4)
    >>> rollout = generate(model, tokenizer, [[70, 71], [72]], sampling, torch.Generator().manual_seed(0))
    >>> rollout.group.tolist(), rollout.sequences()[1].max().item() <= 6
    ([0, 0, 0, 1, 1, 1], True)
    """
    require_cacheable(model)
    _, eos_ids = special_tokens(model, tokenizer)
    vocabulary = usable_vocabulary(model, tokenizer)
    head = head_of(model, vocabulary).detach()
    _check_prompts(model, prompts, sampling, head.tokens)
    device = head.weight.device
    copies = sampling.responses_per_prompt
    drawn = torch.rand(
        len(prompts) * copies,
        sampling.max_new_tokens,
        dtype=torch.float64,
        generator=generator,
        device=generator.device,
    )
    step = batch_size or len(prompts)
    if head.weight.dtype != torch.float64 and not suits(device.type, {head.weight.dtype}, torch.float32):
        bias = None if head.bias is None else head.bias.float()
        head = replace(head, weight=head.weight.float(), bias=bias)
    stops = StopStrings(tokenizer, sampling.stop) if sampling.stop else None
    parts = []
    with evaluating(model), fast_linears(model, max(max(map(len, prompts)) * len(prompts), len(drawn))):
        for start in range(0, len(prompts), step):
            uniforms = drawn[start * copies : (start + step) * copies].to(device)
            batch = Batch(model, head, eos_ids, sampling, stops, uniforms)
            parts.append(batch.run(prompts[start : start + step]))
    return concatenate(parts)


def _check_prompts(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], sampling: SamplingConfig, tokens: int
) -> None:
    """Refuse prompts that the model cannot answer, by their number."""
    if not prompts:
        raise UserError("there are no prompts to respond to")
    context = context_length(model)
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise UserError(f"prompt {index} is empty: a response needs at least one token before it")
        if not 0 <= min(prompt) <= max(prompt) < tokens:
            raise UserError(
                f"prompt {index} holds token {min(prompt) if min(prompt) < 0 else max(prompt)}, but the "
                f"vocabulary has {tokens}: encode it with the model's own tokenizer"
            )
        if context is not None and len(prompt) + sampling.max_new_tokens > context:
            raise UserError(
                f"prompt {index} has {len(prompt)} tokens; with max_new_tokens = {sampling.max_new_tokens} "
                f"that exceeds the model's context of {context}: shorten the prompt or lower max_new_tokens"
            )
