"""What a stage reads, checked before the run's first step: data, rewards, reference."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kedge.errors import UserError
from kedge.models import context_length, special_tokens
from kedge.rewards import RewardSet
from kedge.training.config import (
    ExamplesConfig,
    PairsConfig,
    PolicyStage,
    PpoStage,
    PromptsConfig,
    RewardStage,
    SftStage,
    Stage,
)
from kedge.training.examples import Examples, encode_examples
from kedge.training.model_reward import ModelReward
from kedge.training.pairs import Pairs, encode_pairs
from kedge.training.prompts import Prompts, encode_prompts
from kedge.training.resources import (
    load_function,
    load_scorer,
    make_critic,
    make_reference,
    make_rewards,
    rewards_by_name,
    rows_of,
)

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
    """Given from Python, for stages without one of their own."""
    reward_models: Mapping[str, Path] = field(default_factory=dict)
    """Where each reward stage leaves its final model."""
    loaded: dict[str, ModuleType] = field(default_factory=dict)
    """Files of reward functions that have been run: once for all stages."""


@dataclass(frozen=True)
class SftInputs:
    """Examples to learn and, with an evaluation, held-out ones; notes tell what was left out."""

    train: Examples
    heldout: Examples | None
    notes: list[str]


@dataclass(frozen=True)
class RewardInputs:
    """Pairs to learn and, with an evaluation, held-out ones; the tokenizer of the reward model."""

    train: Pairs
    heldout: Pairs | None
    tokenizer: PreTrainedTokenizerBase
    notes: list[str]


@dataclass(frozen=True)
class PolicyInputs:
    """Prompts to answer, held-out ones with an evaluation, and the rewards of both."""

    train: Prompts
    heldout: Prompts | None
    rewards: RewardSet
    heldout_rewards: RewardSet
    """The same functions; failures in a row are counted apart."""
    reward_models: list[ModelReward]
    """Those among the rewards; they are loaded when the stage begins."""
    longest: int
    """Tokens of the longest prompt and response."""
    notes: list[str]
    critic: str | Path | None = None
    """The model that the critic starts from, where the recipe names one; checked, loaded when the stage begins."""


Inputs = SftInputs | RewardInputs | PolicyInputs


def require_use(stages: Sequence[Stage], materials: Materials) -> None:
    """Refuse what was given from Python where no stage would use it.

    Raises:
        UserError: a reference, or rewards by name.
    """
    policies = [stage for stage in stages if isinstance(stage, PolicyStage)]
    if materials.reference is not None and all(stage.reference is not None for stage in policies):
        raise UserError(
            "reference: no stage would use the one given from Python; it serves GRPO and PPO stages without a "
            "`reference` of their own: take that out of the recipe, or do not give this one"
        )
    asked = [entry for stage in policies if stage.rewards is not None for entry in stage.rewards.functions]
    named = {entry.name for entry in asked if entry.function is None and entry.model is None}
    unused = [name for name in rewards_by_name(materials.rewards) if name not in named]
    if unused and all(stage.rewards is not None for stage in policies):
        raise UserError(
            f"rewards: no stage would use {', '.join(map(repr, unused))} given from Python; name them among a "
            "stage's `rewards.functions`, leave that section out, or do not give them"
        )


def load_inputs(stage: Stage, materials: Materials) -> Inputs:
    """Load what a stage needs.

    Raises:
        UserError: data, a reward or the reference cannot be used.
    """
    if isinstance(stage, SftStage):
        return _sft(stage, materials)
    return _reward(stage, materials) if isinstance(stage, RewardStage) else _policy(stage, materials)


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
        ends=special_tokens(materials.model, materials.tokenizer)[1],
        completion_only=stage.completion_only,
        limit=min(limits, default=None),
        true_log_prob=load_function(known, "true_log_prob", materials.loaded) if known is not None else None,
    )
    if dropped:
        total = len(examples) + dropped
        notes.append(
            f"stage {stage.name}: {key}: {dropped} of {total} examples are too long and were left out"
        )
    return examples


def _reward(stage: RewardStage, materials: Materials) -> RewardInputs:
    notes: list[str] = []
    model, tokenizer = materials.model, materials.tokenizer
    if stage.path is not None:  # checked now, loaded again when the stage begins
        model, tokenizer = load_scorer(stage.path, materials.model.dtype)
    limits = [limit for limit in (stage.max_tokens, context_length(model)) if limit is not None]

    def pairs(data: PairsConfig, key: str) -> Pairs:
        known = stage.true_preference if key == "evaluation.data" else None
        found, dropped = encode_pairs(
            rows_of(data, materials.seed),
            tokenizer,
            ends=special_tokens(model, tokenizer)[1],
            limit=min(limits, default=None),
            true_preference=load_function(known, "true_preference", materials.loaded)
            if known is not None
            else None,
        )
        if dropped:
            total = len(found) + dropped
            notes.append(
                f"stage {stage.name}: {key}: {dropped} of {total} pairs are too long and were left out"
            )
        return found

    train = pairs(stage.data, "data")
    heldout = pairs(stage.evaluation.data, "evaluation.data") if stage.evaluation is not None else None
    return RewardInputs(train, heldout, tokenizer, notes)


def _policy(stage: PolicyStage, materials: Materials) -> PolicyInputs:
    notes: list[str] = []
    models = _reward_models(stage, materials)
    named = {model.name: model for model in models}
    rewards = make_rewards(stage.rewards, materials.rewards, named, materials.loaded)
    train = _prompts(stage, stage.data, materials, "data", notes)
    rewards.check_columns(train.column_names)
    heldout = None
    if stage.evaluation is not None:
        heldout = _prompts(stage, stage.evaluation.data, materials, "evaluation.data", notes)
        rewards.check_columns(heldout.column_names)
    prompts = [*train.tokens, *(heldout.tokens if heldout is not None else [])]
    longest = max(map(len, prompts)) + stage.rollout.max_new_tokens
    if stage.reference is not None:  # checked now, loaded when the stage begins
        reference = make_reference(stage.reference, None, materials.model, materials.tokenizer)
        require_room("reference", reference, longest)
    elif materials.reference is not None:
        require_room("reference", materials.reference, longest)
    critic = None
    if isinstance(stage, PpoStage) and stage.critic.model is not None:
        critic = materials.reward_models.get(stage.critic.model, stage.critic.model)
        if stage.critic.model not in materials.reward_models:  # checked now, like the reference
            backbone = make_critic(critic, materials.model, materials.tokenizer).backbone
            assert backbone is not None  # what is loaded has one
            require_room("critic", backbone, longest)
    return PolicyInputs(train, heldout, rewards, rewards.apart(), models, longest, notes, critic)


def require_room(what: str, model: PreTrainedModel, tokens: int) -> None:
    """Refuse a model whose context ends before the longest sequence does."""
    context = context_length(model)
    if context is not None and tokens > context:
        raise UserError(
            f"the {what} has a context of {context} tokens, and prompt and response can have {tokens}: lower "
            f"rollout.max_new_tokens or rollout.max_prompt_tokens, or take another {what}"
        )


def _reward_models(stage: PolicyStage, materials: Materials) -> list[ModelReward]:
    """Set up the reward models among a stage's rewards; those that exist already are checked now."""
    models = []
    _, ends = special_tokens(materials.model, materials.tokenizer)
    for entry in stage.rewards.functions if stage.rewards is not None else ():
        if entry.model is None:
            continue
        size = entry.micro_batch or stage.compute.micro_batch
        model = ModelReward(
            name=entry.model_name,
            source=materials.reward_models.get(entry.model, entry.model),
            policy_tokenizer=materials.tokenizer,
            end_ids=ends,
            compute=stage.compute.model_copy(update={"micro_batch": size}),
        )
        if entry.model not in materials.reward_models:
            model.load(torch.device("cpu"), materials.model.dtype)
            model.unload()
        models.append(model)
    return models


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
