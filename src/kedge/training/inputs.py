"""What a stage reads, checked before the run's first step: data, rewards, reference."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kedge.models import context_length
from kedge.rewards import RewardSet
from kedge.training.config import (
    ExamplesConfig,
    PolicyStage,
    PpoStage,
    PromptsConfig,
    SftStage,
    Stage,
)
from kedge.training.examples import Examples, encode_examples
from kedge.training.prompts import Prompts, encode_prompts
from kedge.training.resources import load_function, make_critic, make_reference, make_rewards, rows_of

Rewards = Sequence[Callable[..., Any]] | Mapping[str, Callable[..., Any]] | None


@dataclass(frozen=True)
class Materials:
    """What the stages of a run share."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    seed: int
    rewards: Rewards = None
    reference: PreTrainedModel | None = None
    """Given from Python; else the recipe's, else a frozen copy of the policy."""


@dataclass(frozen=True)
class SftInputs:
    """Examples to learn and, with an evaluation, held-out ones; notes tell what was left out."""

    train: Examples
    heldout: Examples | None
    notes: list[str]


@dataclass(frozen=True)
class PolicyInputs:
    """Prompts to answer, held-out ones with an evaluation, and the rewards of both."""

    train: Prompts
    heldout: Prompts | None
    rewards: RewardSet
    heldout_rewards: RewardSet
    """The same functions; failures in a row are counted apart."""
    notes: list[str]


def load_inputs(stage: Stage, materials: Materials) -> SftInputs | PolicyInputs:
    """Load what a stage needs.

    Raises:
        UserError: data, a reward or the reference cannot be used.
    """
    return _sft(stage, materials) if isinstance(stage, SftStage) else _policy(stage, materials)


def _sft(stage: SftStage, materials: Materials) -> SftInputs:
    notes: list[str] = []
    train = _examples(stage, stage.data, materials, "data", notes)
    heldout = None
    if stage.evaluation is not None:
        heldout = _examples(stage, stage.evaluation.data, materials, "evaluation.data", notes)
    return SftInputs(train, heldout, notes)


def _examples(
    stage: SftStage, data: ExamplesConfig, materials: Materials, key: str, notes: list[str]
) -> Examples:
    limits = [limit for limit in (stage.max_tokens, context_length(materials.model)) if limit is not None]
    known = stage.true_log_prob if key == "evaluation.data" else None
    examples, dropped = encode_examples(
        rows_of(data, materials.seed),
        materials.tokenizer,
        completion_only=stage.completion_only,
        limit=min(limits, default=None),
        true_log_prob=load_function(known, "true_log_prob") if known is not None else None,
    )
    if dropped:
        total = len(examples) + dropped
        notes.append(
            f"stage {stage.name}: {key}: {dropped} of {total} examples are too long and were left out"
        )
    return examples


def _policy(stage: PolicyStage, materials: Materials) -> PolicyInputs:
    notes: list[str] = []
    rewards, heldout_rewards = (make_rewards(stage.rewards, materials.rewards) for _ in range(2))
    train = _prompts(stage, stage.data, materials, "data", notes)
    rewards.check_columns(train.column_names)
    heldout = None
    if stage.evaluation is not None:
        heldout = _prompts(stage, stage.evaluation.data, materials, "evaluation.data", notes)
        heldout_rewards.check_columns(heldout.column_names)
    if stage.reference is not None:  # checked now, loaded when the stage begins
        make_reference(stage.reference, materials.reference, materials.model, materials.tokenizer)
    if isinstance(stage, PpoStage) and stage.critic.path is not None:  # the same
        make_critic(stage.critic, materials.model, materials.tokenizer)
    return PolicyInputs(train, heldout, rewards, heldout_rewards, notes)


def _prompts(
    stage: PolicyStage, data: PromptsConfig, materials: Materials, key: str, notes: list[str]
) -> Prompts:
    prompts, dropped = encode_prompts(
        rows_of(data, materials.seed),
        materials.tokenizer,
        context=context_length(materials.model),
        max_new_tokens=stage.rollout.max_new_tokens,
        max_prompt_tokens=stage.rollout.max_prompt_tokens,
    )
    if dropped:
        total = len(prompts) + dropped
        notes.append(
            f"stage {stage.name}: {key}: {dropped} of {total} prompts are too long and were left out"
        )
    return prompts
