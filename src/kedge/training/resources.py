"""From a recipe's words to objects: device, model, tokenizer, rows of data, reference."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kedge.data import Rows, format_pairs, format_rows, load_rows
from kedge.errors import RunError, UserError
from kedge.models import (
    DTYPES,
    Critic,
    build_model,
    disable_dropout,
    frozen_copy,
    load_critic,
    load_model,
    load_reward_model,
    load_tokenizer,
    require_embeddings,
    reward_model_from,
    special_tokens,
    train_bpe,
    usable_vocabulary,
    verify_head,
    verify_scores,
    vocabulary_difference,
)
from kedge.rewards import RewardSet, WeightedReward, load_reward
from kedge.runs.seeds import derive_seed
from kedge.training.config import (
    ExamplesConfig,
    ModelConfig,
    PairsConfig,
    PromptsConfig,
    ReferenceConfig,
    RewardConfig,
    RewardsConfig,
    RewardStage,
    TokenizerConfig,
)

TASKS = ("sums", "prose")
TASK_ROWS = 4096


def task(name: str) -> Any:
    """Import an embedded task."""
    if name not in TASKS:
        raise UserError(f"task: {name!r} is none of {', '.join(TASKS)}")
    return importlib.import_module(f"kedge.tasks.{name}")


def rows_of(config: PromptsConfig, seed: int) -> Rows:
    """Load the rows of a data section: prompts alone, examples with their completions, or preference pairs."""
    if config.task is not None:
        rows = Rows(_task_rows(config, config.task, derive_seed(seed, "data")), f"task {config.task}")
    else:
        rows = load_rows(str(config.path), split=config.split, count=config.count)
    if isinstance(config, PairsConfig):
        return format_pairs(rows, prompt=config.prompt, chosen=config.chosen, rejected=config.rejected)
    completion = config.completion if isinstance(config, ExamplesConfig) else None
    return format_rows(rows, prompt=config.prompt, completion=completion)


def _task_rows(config: PromptsConfig, name: str, seed: int) -> list[dict[str, Any]]:
    kinds = {ExamplesConfig: "examples", PairsConfig: "preferences"}
    kind = next((kind for section, kind in kinds.items() if isinstance(config, section)), "prompts")
    split = config.split or "train"
    if split not in ("train", "heldout"):
        raise UserError(f"split: a task has train and heldout, not {split!r}")
    make = getattr(task(name), kind, None)
    if make is None:
        raise UserError(f"task: {name} has no preference pairs; prose has")
    rows: list[dict[str, Any]] = make(split, config.count or TASK_ROWS, seed)
    return rows


def make_tokenizer(config: TokenizerConfig, seed: int) -> PreTrainedTokenizerBase:
    """Load or train the tokenizer."""
    if config.path is not None:
        return load_tokenizer(config.path)
    if config.task is not None:
        made: PreTrainedTokenizerBase = task(config.task).tokenizer()
        return made
    assert config.bpe is not None  # the configuration gives exactly one
    rows = rows_of(config.bpe.data, seed)
    return train_bpe([f"{row['prompt']}{row['completion']}" for row in rows], config.bpe.vocab_size)


def make_model(
    config: ModelConfig, seed: int, device: torch.device
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load or build the policy as it is before the first stage."""
    dtype = DTYPES[config.dtype]
    if config.path is not None:
        revision, trust = config.revision, config.trust_remote_code
        model = load_model(config.path, dtype=dtype, revision=revision, trust_remote_code=trust)
        if config.tokenizer is not None:
            tokenizer = make_tokenizer(config.tokenizer, seed)
        else:
            tokenizer = load_tokenizer(config.path, revision=revision, trust_remote_code=trust)
    elif config.build is not None and config.tokenizer is not None:
        tokenizer = make_tokenizer(config.tokenizer, seed)
        build = config.build
        model = build_model(
            len(tokenizer),
            architecture=build.architecture,
            hidden_size=build.hidden_size,
            layers=build.layers,
            heads=build.heads,
            intermediate_size=build.intermediate_size or 3 * build.hidden_size,
            context=build.context,
            seed=derive_seed(seed, "model"),
            pad_id=tokenizer.pad_token_id,
            eos_id=tokenizer.eos_token_id,
            bos_id=tokenizer.bos_token_id,
            options={"initializer_range": build.initializer_range},
        ).to(dtype)
    else:
        raise UserError("model: give path, or build and tokenizer, or pass a model from Python")
    return model.to(device), tokenizer


def prepare_policy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that Kedge understands the model, and switch off what must not act while training."""
    if not isinstance(model, PreTrainedModel) or getattr(model, "_hf_peft_config_loaded", False):
        raise UserError(
            f"the model is a {type(model).__name__}, or has adapters, and a checkpoint of it could not be gone on "
            "from: give a model of transformers, with adapters merged into it (model.merge_and_unload())"
        )
    if model.dtype not in DTYPES.values():
        raise UserError(
            f"the model is in {model.dtype}, whose range is too narrow for gradients: give it in "
            f"{', '.join(str(dtype) for dtype in DTYPES.values())}"
        )
    special_tokens(model, tokenizer)
    usable_vocabulary(model, tokenizer)
    verify_head(model)
    disable_dropout(model)


def make_reference(
    config: ReferenceConfig | None,
    given: PreTrainedModel | None,
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
) -> PreTrainedModel:
    """Give what the policy is anchored to: the recipe's, else the one given, else a frozen copy of the policy."""
    if config is not None:
        model, source = load_model(config.path, dtype=policy.dtype), config.path
        _require_same_tokens("reference", config.path, tokenizer)
    elif given is not None:
        model, source = given, "the reference given"
    else:
        return frozen_copy(policy)
    rows = [
        usable_vocabulary(m, tokenizer) or m.get_output_embeddings().weight.shape[0] for m in (policy, model)
    ]
    if rows[0] != rows[1]:
        raise UserError(
            f"reference: {source} has a vocabulary of {rows[1]} entries, the policy of {rows[0]}; the KL between "
            "them means nothing: take a reference with the policy's tokenizer"
        )
    verify_head(model)
    return frozen_copy(model).to(policy.device)


def load_scorer(source: str | Path, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a reward model with its tokenizer, and check that Kedge understands both."""
    model, tokenizer = load_reward_model(source, dtype=dtype), load_tokenizer(source)
    require_embeddings(model, tokenizer)
    verify_scores(model)
    return model, tokenizer


def make_scorer(
    stage: RewardStage, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, seed: int
) -> PreTrainedModel:
    """Give the reward model as it is before its stage: from a path, or the policy's backbone under a fresh head."""
    if stage.path is not None:
        model, _ = load_scorer(stage.path, policy.dtype)
    else:
        pad, ends = special_tokens(policy, tokenizer)
        model = reward_model_from(
            policy, seed=derive_seed(seed, "reward model", stage.name), pad_id=pad, end_ids=ends
        )
    return disable_dropout(model).to(policy.device)


def make_critic(source: str | Path, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Critic:
    """Give a critic that starts from a model: a language model's backbone, or a reward model."""
    _require_same_tokens("critic", str(source), tokenizer)
    critic = load_critic(source, dtype=policy.dtype)
    assert critic.backbone is not None  # what is loaded has one
    require_embeddings(critic.backbone, tokenizer)
    disable_dropout(critic.backbone)
    return critic.to(policy.device)


def _require_same_tokens(what: str, path: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a model whose own tokenizer, if it has one, gives other ids to the same text."""
    try:
        theirs = load_tokenizer(path)
    except (UserError, RunError):
        return
    difference = vocabulary_difference(tokenizer, theirs)
    if difference is not None:
        reason = {
            "reference": "the KL between them means nothing",
            "critic": "it would read other words than the policy writes",
        }[what]
        raise UserError(
            f"{what}: {path} has another vocabulary than the policy ({difference}); {reason}: take a {what} with the "
            "policy's tokenizer"
        )


def make_rewards(
    config: RewardsConfig | None,
    given: Sequence[Callable[..., Any]] | Mapping[str, Callable[..., Any]] | None,
    models: Mapping[str, Callable[..., Any]],
    loaded: dict[str, ModuleType],
) -> RewardSet:
    """Resolve rewards by name: functions from the recipe or from Python, reward models among ``models``.

    Files of functions that are in ``loaded`` are not run again; the others are added.
    """
    named = rewards_by_name(given)
    if config is None:
        if not named:
            raise UserError("rewards: give at least one function, in the recipe or from Python")
        config = RewardsConfig(functions=[RewardConfig(name=name) for name in named])
    functions = []
    for entry in config.functions:
        if entry.model is not None:
            model = models[entry.model_name]
            functions.append(WeightedReward(entry.model_name, model, entry.weight, timed=False))
            continue
        if entry.function is not None:
            function = load_reward(entry.function, loaded=loaded)
        elif entry.name in named:
            function = named[str(entry.name)]
        else:
            known = f" (given: {', '.join(named)})" if named else ""
            raise UserError(f"rewards: {entry.name!r} has no `function` and was not given from Python{known}")
        functions.append(WeightedReward(entry.name or _name(function), function, entry.weight))
    return RewardSet(
        functions,
        time_limit=config.time_limit,
        on_error=config.on_error,
        max_consecutive_drops=config.max_consecutive_drops,
    )


def rewards_by_name(
    given: Sequence[Callable[..., Any]] | Mapping[str, Callable[..., Any]] | None,
) -> dict[str, Callable[..., Any]]:
    """Sort functions given from Python by their names, of which every one must have its own."""
    if isinstance(given, Mapping):
        return dict(given)
    named: dict[str, Callable[..., Any]] = {}
    for function in given or ():
        if (name := _name(function)) in named:
            raise UserError(
                f"rewards: two of the functions given are called {name!r}; give a dictionary instead, with a name for "
                "each"
            )
        named[name] = function
    return named


def _name(function: Callable[..., Any]) -> str:
    return str(getattr(function, "__name__", type(function).__name__))


def load_function(name: str, what: str, loaded: dict[str, ModuleType]) -> Callable[..., Any]:
    """Load ``module:function`` for something other than a reward."""
    try:
        return load_reward(name, loaded=loaded)
    except UserError as error:
        raise UserError(f"{what}: {error}") from None
