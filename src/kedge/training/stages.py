"""One stage of a recipe, put together: data, reference, rewards, and the work that the loop runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kedge.models import (
    context_length,
    enable_activation_checkpointing,
    fingerprint,
    usable_vocabulary,
)
from kedge.objective import Adaptive, Budget, Controller, Fixed, caution
from kedge.rollout import SamplingConfig
from kedge.runs import RunDirectory, environment
from kedge.training.collect import Collector
from kedge.training.config import AdaptiveConfig, AnchorConfig, BudgetConfig, GrpoStage, SftStage
from kedge.training.evaluation import PolicyEvaluator
from kedge.training.examples import Examples, encode_examples
from kedge.training.interrupt import Interrupt
from kedge.training.loop import Session, Work, run_loop
from kedge.training.policy import PolicyWork
from kedge.training.progress import Progress
from kedge.training.prompts import Prompts, encode_prompts
from kedge.training.resources import (
    load_function,
    make_reference,
    make_rewards,
    prepare_policy,
    rows_of,
)
from kedge.training.scoring import Scorer
from kedge.training.sft import SftWork

Rewards = Sequence[Callable[..., Any]] | Mapping[str, Callable[..., Any]] | None


@dataclass(frozen=True)
class Materials:
    """What a stage starts from."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    seed: int
    rewards: Rewards = None
    reference: PreTrainedModel | None = None
    """Given from Python; else the recipe's, else a frozen copy of the policy."""


def run_stage(
    stage: SftStage | GrpoStage,
    materials: Materials,
    run: RunDirectory,
    progress: Progress,
    interrupt: Interrupt,
) -> None:
    """Train ``materials.model`` in place through one stage, from where the run directory says it is."""
    model, tokenizer = materials.model, materials.tokenizer
    prepare_policy(model, tokenizer)
    if stage.compute.activation_checkpointing:
        enable_activation_checkpointing(model)
    session = Session(
        stage=stage,
        model=model,
        tokenizer=tokenizer,
        device=materials.device,
        seed=materials.seed,
        run=run,
        progress=progress,
        interrupt=interrupt,
        identity={"policy at the start": fingerprint(model)},
    )
    work = sft_work(stage, session) if isinstance(stage, SftStage) else policy_work(stage, session, materials)
    run.record_environment(
        environment(
            device=str(materials.device),
            seed=materials.seed,
            reference=session.identity.get("reference"),
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            model=f"{model.config.model_type}",
        )
    )
    first = session.checkpoints.moments()
    progress.stage(stage.name, stage.method, first[-1].step if first else 0, stage.steps)
    run_loop(session, work)


def sft_work(stage: SftStage, session: Session) -> Work:
    """Put together what SFT does in a step."""
    train = _examples(stage, session, heldout=False)
    heldout = _examples(stage, session, heldout=True) if stage.evaluation is not None else None
    vocabulary = usable_vocabulary(session.model, session.tokenizer)
    return SftWork(session, stage, train, heldout, Scorer(stage.compute, 1.0, vocabulary))


def _examples(stage: SftStage, session: Session, *, heldout: bool) -> Examples:
    data = stage.evaluation.data if heldout and stage.evaluation is not None else stage.data
    context = context_length(session.model)
    limits = [limit for limit in (stage.max_tokens, context) if limit is not None]
    source = f"stage {stage.name}: {'evaluation.data' if heldout else 'data'}"
    known = stage.true_log_prob if heldout else None
    examples, dropped = encode_examples(
        rows_of(data, session.seed, "examples"),
        session.tokenizer,
        completion_only=stage.completion_only,
        limit=min(limits, default=None),
        true_log_prob=load_function(known, "true_log_prob") if known is not None else None,
    )
    if dropped:
        _note(
            session,
            f"{source}: {dropped} of {len(examples) + dropped} examples are too long and were left out",
        )
    return examples


def policy_work(stage: GrpoStage, session: Session, materials: Materials) -> Work:
    """Put together what GRPO does in a step."""
    reference = make_reference(stage.reference, materials.reference, session.model, session.tokenizer)
    session.identity = {**session.identity, "reference": fingerprint(reference)}
    if (warning := caution(stage.anchor.build())) is not None:
        session.progress.say(f"warning: {warning}")
        session.run.log(f"warning: {warning}")
    rewards = make_rewards(stage.rewards, materials.rewards)
    vocabulary = usable_vocabulary(session.model, session.tokenizer)
    sampling = SamplingConfig(
        responses_per_prompt=stage.rollout.responses_per_prompt,
        max_new_tokens=stage.rollout.max_new_tokens,
        temperature=stage.rollout.temperature,
        stop=tuple(stage.rollout.stop),
    )
    return PolicyWork(
        session=session,
        stage=stage,
        reference=reference,
        scorer=Scorer(stage.compute, stage.rollout.temperature, vocabulary),
        collector=Collector(
            model=session.model,
            tokenizer=session.tokenizer,
            prompts=_prompts(stage, session, heldout=False),
            rewards=rewards,
            sampling=sampling,
            prompts_per_step=stage.rollout.prompts_per_step,
            resample_equal_groups=stage.rollout.resample_equal_groups,
            seed=session.seed,
            precision=stage.compute.precision,
        ),
        controller=controller_of(stage.anchor),
        evaluator=_evaluator(stage, session, reference, materials.rewards, vocabulary),
    )


def _evaluator(
    stage: GrpoStage, session: Session, reference: PreTrainedModel, given: Rewards, vocabulary: int | None
) -> PolicyEvaluator | None:
    config = stage.evaluation
    if config is None:
        return None
    sampling = SamplingConfig(
        responses_per_prompt=config.responses_per_prompt,
        max_new_tokens=stage.rollout.max_new_tokens,
        temperature=config.temperature,
        stop=tuple(stage.rollout.stop),
    )
    return PolicyEvaluator(
        config=config,
        model=session.model,
        reference=reference,
        tokenizer=session.tokenizer,
        prompts=_prompts(stage, session, heldout=True),
        rewards=make_rewards(stage.rewards, given),
        sampling=sampling,
        scorer=Scorer(stage.compute, config.temperature or 1.0, vocabulary),
        seed=session.seed,
    )


def _prompts(stage: GrpoStage, session: Session, *, heldout: bool) -> Prompts:
    data = stage.evaluation.data if heldout and stage.evaluation is not None else stage.data
    rollout = stage.rollout
    prompts, dropped = encode_prompts(
        rows_of(data, session.seed, "prompts"),
        session.tokenizer,
        context=context_length(session.model),
        max_new_tokens=rollout.max_new_tokens,
        max_prompt_tokens=rollout.max_prompt_tokens,
    )
    if dropped:
        where = f"stage {stage.name}: {'evaluation.data' if heldout else 'data'}"
        _note(
            session, f"{where}: {dropped} of {len(prompts) + dropped} prompts are too long and were left out"
        )
    return prompts


def _note(session: Session, text: str) -> None:
    session.progress.say(f"note: {text}")
    session.run.log(text)


def controller_of(anchor: AnchorConfig) -> Controller:
    """Make what sets β."""
    config = anchor.controller
    if isinstance(config, BudgetConfig):
        given = {
            name: getattr(config, name)
            for name in ("beta", "low", "high")
            if getattr(config, name) is not None
        }
        return Budget(budget=config.budget, unit=config.unit, **given)
    if isinstance(config, AdaptiveConfig):
        return Adaptive(beta=config.beta, target=config.target, horizon=config.horizon, unit=config.unit)
    return Fixed(beta=config.beta)
