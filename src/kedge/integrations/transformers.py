"""``DriftCallback``: how far the model of a Hugging Face ``Trainer`` has moved from where it started."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from kedge.errors import UserError
from kedge.head import Head
from kedge.measure.config import Given, MeasureConfig, require_acting
from kedge.measure.figures import figures
from kedge.measure.models import Models
from kedge.measure.pipeline import Pipeline, Work
from kedge.measure.plan import backend_for, plan
from kedge.measure.progress import Silent
from kedge.measure.questions import Question, Side
from kedge.measure.table import TokenTable
from kedge.models import frozen_copy, head_of, load_model
from kedge.runs.interrupt import Interrupt

_ACTING = frozenset(
    {"responses", "sample_from", "max_new_tokens", "temperature", "count", "prompt", "text", "seed", "batch"}
    | {"window", "split", "backend"}
)
"""Settings of a comparison that act here: the others are about loading models, and about intervals."""
FEWEST_RESAMPLES = 40
"""Intervals are not logged: as few resamples as a comparison may have."""
_PAIRS = {"reverse_kl": "kl/policy_reference/exact", "forward_kl": "kl/reference_policy/exact"}


class DriftCallback(TrainerCallback):
    """Logs the exact KL of the model in training to its starting model, on fixed prompts or texts, every n steps.

    The values are those of ``kedge.measure.compare`` on the same checkpoints, through the same functions: responses
    are drawn with the same random numbers each time, so that changes are the model's. It logs at step 0, every
    ``every`` steps, and at the last step, early stopping's, too. Training is left as it is: modes, gradients, random
    states. Add it to the trainer that it is made for:

        trainer.add_callback(DriftCallback(trainer, prompts="held-out.jsonl", every=50))

    Logged, nats: ``kl/policy_reference/exact`` per token and ``…_per_response``, along responses of the policy;
    ``kl/reference_policy/exact`` and ``…_per_response``, along those of the reference, where they are drawn;
    ``texts/kl/policy_reference/exact`` and ``texts/kl/reference_policy/exact`` per token of the texts; each with its
    standard error, ``…_se``, clustered by prompt or text. ``drift/noise_floor``: the larger mean KL of either model
    to itself between batches of other shapes. ``drift/seconds``: what the measurement cost.

    Args:
        trainer: any ``transformers.Trainer`` or what is built on it. In a run on several processes each of them
            measures all, as replicas do; sharded weights are refused.
        prompts: a file, a dataset's name, or rows; responses to them are sampled.
        texts: the same with texts, messages, or prompt and completion, to be scored.
        every: steps between two measurements.
        reference: what the drift is measured from: None: the trainer's model as it is now, kept as a frozen copy
            or, if it is a PEFT model, had by switching its adapters off (to measure from where an adapter that was
            trained before begins, give its folder); else a path or name, or a model.
        tokenizer: the trainer's ``processing_class`` when left out.
        settings: of ``kedge.measure.MeasureConfig``: responses, sample_from (here ``policy`` by default),
            max_new_tokens, temperature, split, count, prompt, text, window, seed, batch, backend.

    Raises:
        UserError: something given cannot be used.
    """

    def __init__(
        self,
        trainer: Trainer,
        *,
        prompts: Given | None = None,
        texts: Given | None = None,
        every: int = 100,
        reference: str | Path | PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        **settings: Any,
    ) -> None:
        if prompts is None and texts is None:
            raise UserError("DriftCallback: nothing to measure on: give prompts, texts, or both")
        if every < 1:
            raise UserError(f"DriftCallback: every = {every} must be at least 1 step")
        require_acting(settings, prompts=prompts, texts=texts)
        self._config = _config(settings)
        self._trainer, self._every = trainer, every
        self._measured: int | None = None
        with _undisturbed(trainer.model):
            self._models = _models(trainer, reference, tokenizer or trainer.processing_class)
            self._plan = plan(self._models, self._config, prompts, texts)
            self._backend = backend_for(self._models, self._config, self._plan)

    def measure(self) -> dict[str, float]:
        """Measure now and return what would be logged."""
        started = time.perf_counter()
        works = [Work(each.question, each.windows) for each in self._plan]
        with _undisturbed(self._trainer.model):
            self._models.follow(self._trainer.model)
            Pipeline(self._models, self._config, self._backend, Silent(), Interrupt()).run(works)
        values: dict[str, float] = {}
        for work in works:
            found = figures(TokenTable.join(work.tables), work.question, self._config)
            for figure, name in _names(work.question).items():
                values[name] = found.estimates[figure].value
                values[f"{name}_se"] = found.estimates[figure].standard_error
        values["drift/noise_floor"] = max(floor.mean for work in works for floor in work.floor.values())
        return values | {"drift/seconds": time.perf_counter() - started}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure the start, or what a resumed run starts from."""
        self._measured = None
        self._log(state, control)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure every so many steps, and at the end."""
        ends = control.should_training_stop or state.global_step >= state.max_steps
        if state.global_step % self._every == 0 or ends:
            self._log(state, control)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure where an evaluation has ended training: early stopping."""
        self._log_last(state, control)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure where callbacks after this one have ended training."""
        self._log_last(state, control)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure the end if nothing above has, unless the best weights have taken the place of the last ones."""
        if not args.load_best_model_at_end:
            self._log(state, control)

    def _log_last(self, state: TrainerState, control: TrainerControl) -> None:
        if control.should_training_stop:
            self._log(state, control)

    def _log(self, state: TrainerState, control: TrainerControl) -> None:
        if state.global_step == self._measured:
            return
        self._measured = state.global_step
        due = control.should_log
        # Trainers built on this one add, and clear, their own running means in their log: theirs is not called.
        Trainer.log(self._trainer, self.measure())
        control.should_log = due  # logging took it back: the loss of this step is still to be logged


class _Pair(Models):
    """The trainer's model beside a frozen one."""

    def __init__(
        self, policy: PreTrainedModel, reference: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        super().__init__(
            policy, reference, tokenizer, dtype="saved", device=str(policy.device), low_memory=False
        )

    def follow(self, model: Any) -> None:
        """Follow the trainer, which may have made its model anew, moved it, or put other tensors into its place."""
        policy = _policy_of(model)
        self.device = policy.device
        if policy is not self._loaded["policy"]:
            self._exchange(model, policy)
        self.take("reference").to(policy.device)
        for side in ("reference", "policy"):
            self.heads[side] = self._head(side)

    def _exchange(self, model: Any, policy: PreTrainedModel) -> None:
        """Measure another model from now on."""
        self._sources["policy"] = self._loaded["policy"] = policy
        self._learn("policy", policy)

    def _head(self, side: Side) -> Head:
        return head_of(self.take(side), self.vocabulary).detach()


class _Switched(_Pair):
    """One PEFT model, its adapters on for the policy, off for the reference."""

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tuner = model.base_model
        base = model.get_base_model()
        super().__init__(base, base, tokenizer)

    def _exchange(self, model: Any, policy: PreTrainedModel) -> None:
        self._tuner = model.base_model
        self._sources["reference"] = self._loaded["reference"] = policy
        super()._exchange(model, policy)

    def take(self, side: Side) -> PreTrainedModel:
        """Give the model in the state that a side stands for."""
        if side == "policy":
            self._tuner.enable_adapter_layers()
        else:
            self._tuner.disable_adapter_layers()
        return super().take(side)


def _config(settings: dict[str, Any]) -> MeasureConfig:
    idle = sorted(settings.keys() - _ACTING)
    if idle:
        known = {field.name for field in fields(MeasureConfig)}
        reason = "does nothing here" if idle[0] in known else "is no setting of a comparison"
        raise UserError(f"DriftCallback: {idle[0]} {reason}; settings: {', '.join(sorted(_ACTING))}")
    return MeasureConfig(**{"sample_from": "policy", **settings}, resamples=FEWEST_RESAMPLES)


def _models(trainer: Trainer, reference: str | Path | PreTrainedModel | None, tokenizer: Any) -> _Pair:
    model: Any = trainer.model
    if getattr(trainer, "is_fsdp_enabled", False) or getattr(trainer, "is_deepspeed_enabled", False):
        raise UserError(
            "DriftCallback: the trainer shards its weights (FSDP or DeepSpeed), and a model's passes need them "
            "whole: save checkpoints and compare them with `kedge measure`"
        )
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise UserError(
            f"DriftCallback: the trainer's processing class is {type(tokenizer).__name__}, no tokenizer: "
            "give tokenizer="
        )
    policy = _policy_of(model)
    if reference is None and _is_adapted(model):
        return _Switched(model, tokenizer)
    if reference is None:
        start = frozen_copy(policy)
    elif isinstance(reference, PreTrainedModel):
        start = reference
    else:
        start = load_model(reference, dtype=policy.dtype).requires_grad_(False)
    return _Pair(policy, start.to(policy.device), tokenizer)


def _policy_of(model: Any) -> PreTrainedModel:
    """Take the causal language model that a trainer's model is, or that its adapters are on."""
    adapted = _is_adapted(model)
    policy = model.get_base_model() if adapted else model
    if not isinstance(policy, PreTrainedModel):
        raise UserError(
            f"DriftCallback: the trainer's model is a {type(policy).__name__}, no causal language model of "
            "transformers"
        )
    if adapted:
        _require_switches(model, policy)
    if "flash" in str(policy.config._attn_implementation) and policy.dtype == torch.float32:
        raise UserError(
            f"DriftCallback: its passes run in the dtype of the weights, float32, in which "
            f"{policy.config._attn_implementation} does not work: load the model with dtype='bfloat16' or with "
            "attn_implementation='sdpa'"
        )
    return policy


def _is_adapted(model: Any) -> bool:
    """Whether a model is PEFT's; without importing PEFT, which then is imported already."""
    peft = sys.modules.get("peft")
    return peft is not None and isinstance(model, peft.PeftModel)


def _require_switches(model: Any, base: Any) -> None:
    """Refuse adapters that act elsewhere than in the backbone's layers."""
    plain = type(base.get_output_embeddings()).__module__.startswith("torch.nn")
    if not plain or not hasattr(model.base_model, "disable_adapter_layers"):
        where = "the output head" if not plain else "the prompt"
        raise UserError(
            f"DriftCallback: the adapter changes {where}, which its passes do not read: save checkpoints and "
            "compare them with `kedge measure`, which merges adapters"
        )


@contextmanager
def _undisturbed(model: Any) -> Iterator[None]:
    """Put back afterwards what switching and passing could change: random states, which weights are trained."""
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    devices = {parameter.device for parameter, _ in trained if parameter.device.type == "cuda"}
    adapted = _is_adapted(model) and hasattr(model.base_model, "enable_adapter_layers")
    with torch.random.fork_rng(list(devices)), torch.no_grad():
        try:
            yield
        finally:
            if adapted:
                model.base_model.enable_adapter_layers()
            for parameter, requires_grad in trained:
                parameter.requires_grad_(requires_grad)


def _names(question: Question) -> dict[str, str]:
    """What is logged of a question: the name of each figure."""
    if question.sampled_from is None:
        return {figure: f"texts/{_PAIRS[figure]}" for figure in question.headline}
    (figure,) = question.headline
    return {figure: _PAIRS[figure], f"{figure}_per_response": f"{_PAIRS[figure]}_per_response"}
