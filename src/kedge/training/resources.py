"""From a recipe's words to objects: device, model, tokenizer, rows of data, reference."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kedge.data import Rows, format_rows, load_rows
from kedge.errors import RunError, UserError
from kedge.models import (
    DTYPES,
    build_model,
    disable_dropout,
    frozen_copy,
    load_model,
    load_tokenizer,
    special_tokens,
    train_bpe,
    usable_vocabulary,
    verify_head,
    vocabulary_difference,
)
from kedge.rewards import RewardSet, load_reward
from kedge.runs.seeds import derive_seed
from kedge.training.config import (
    ExamplesConfig,
    ModelConfig,
    PromptsConfig,
    ReferenceConfig,
    RewardConfig,
    RewardsConfig,
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
    """Load the rows of a data section: prompts alone, or examples with their completions."""
    if config.task is not None:
        kind = "examples" if isinstance(config, ExamplesConfig) else "prompts"
        split = config.split or "train"
        if split not in ("train", "heldout"):
            raise UserError(f"split: a task has train and heldout, not {split!r}")
        made = getattr(task(config.task), kind)(split, config.count or TASK_ROWS, derive_seed(seed, "data"))
        rows = Rows(made, f"task {config.task}")
    else:
        rows = load_rows(str(config.path), split=config.split, count=config.count)
    completion = config.completion if isinstance(config, ExamplesConfig) else None
    return format_rows(rows, prompt=config.prompt, completion=completion)


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
    """Give what the policy is anchored to: by default a frozen copy of it."""
    if config is None and given is None:
        return frozen_copy(policy)
    model = given if given is not None else load_model(str(config.path if config else ""), dtype=policy.dtype)
    source = config.path if config is not None else "the reference given"
    if config is not None:
        _require_same_tokens(config.path, tokenizer)
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


def _require_same_tokens(path: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a reference whose own tokenizer, if it has one, gives other ids to the same text."""
    try:
        theirs = load_tokenizer(path)
    except (UserError, RunError):
        return
    difference = vocabulary_difference(tokenizer, theirs)
    if difference is not None:
        raise UserError(
            f"reference: {path} has another vocabulary than the policy ({difference}); the KL between them means "
            "nothing: take a reference with the policy's tokenizer"
        )


def make_rewards(
    config: RewardsConfig | None,
    given: Sequence[Callable[..., Any]] | Mapping[str, Callable[..., Any]] | None,
) -> RewardSet:
    """Resolve reward functions by name, from the recipe or from those given in Python."""
    named = dict(given) if isinstance(given, Mapping) else {f.__name__: f for f in given or ()}
    if config is None:
        if not named:
            raise UserError("rewards: give at least one function, in the recipe or from Python")
        config = RewardsConfig(functions=[RewardConfig(name=name) for name in named])
    functions = []
    for entry in config.functions:
        if entry.function is not None:
            function = load_reward(entry.function)
        elif entry.name in named:
            function = named[str(entry.name)]
        else:
            known = f" (given: {', '.join(named)})" if named else ""
            raise UserError(f"rewards: {entry.name!r} has no `function` and was not given from Python{known}")
        functions.append((entry.name or function.__name__, function, entry.weight))
    return RewardSet(
        functions,
        time_limit=config.time_limit,
        on_error=config.on_error,
        max_consecutive_drops=config.max_consecutive_drops,
    )


def load_function(name: str, what: str) -> Callable[..., Any]:
    """Load ``module:function`` for something other than a reward."""
    try:
        return load_reward(name)
    except UserError as error:
        raise UserError(f"{what}: {error}") from None
