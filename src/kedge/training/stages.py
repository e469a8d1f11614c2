"""One stage of a recipe, put together: inputs, reference, and the work that the loop runs."""

from __future__ import annotations

from dataclasses import replace

from transformers import PreTrainedModel

from kedge.models import enable_activation_checkpointing, fingerprint, head_of, usable_vocabulary
from kedge.objective import Adaptive, Budget, Controller, Fixed, caution
from kedge.rollout import SamplingConfig
from kedge.runs import RunDirectory, environment
from kedge.runs.interrupt import Interrupt
from kedge.training.backend import head_backend, policy_logits, sft_logits
from kedge.training.collect import Collector
from kedge.training.config import AdaptiveConfig, AnchorConfig, BudgetConfig, GrpoStage, SftStage
from kedge.training.evaluation import PolicyEvaluator
from kedge.training.inputs import Materials, PolicyInputs, SftInputs
from kedge.training.loop import Session, Work, run_loop
from kedge.training.policy import PolicyWork
from kedge.training.progress import Progress
from kedge.training.resources import make_reference
from kedge.training.scoring import Scorer
from kedge.training.sft import SftWork


def run_stage(
    stage: SftStage | GrpoStage,
    inputs: SftInputs | PolicyInputs,
    materials: Materials,
    run: RunDirectory,
    progress: Progress,
    interrupt: Interrupt,
) -> None:
    """Train ``materials.model`` in place through one stage, from where the run directory says it is."""
    model = materials.model
    if stage.compute.activation_checkpointing:
        enable_activation_checkpointing(model)
    session = Session(
        stage=stage,
        model=model,
        tokenizer=materials.tokenizer,
        device=materials.device,
        seed=materials.seed,
        run=run,
        progress=progress,
        interrupt=interrupt,
        identity={"policy at the start": fingerprint(model)},
    )
    for note in inputs.notes:
        _tell(session, f"note: {note}")
    if isinstance(stage, SftStage):
        assert isinstance(inputs, SftInputs)
        work = sft_work(stage, session, inputs)
    else:
        assert isinstance(inputs, PolicyInputs)
        work = policy_work(stage, session, inputs, materials.reference)
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


def sft_work(stage: SftStage, session: Session, inputs: SftInputs) -> Work:
    """Put together what SFT does in a step."""
    vocabulary = usable_vocabulary(session.model, session.tokenizer)
    tokens = head_of(session.model, vocabulary=vocabulary).tokens
    backend = head_backend(stage.compute, sft_logits(stage, inputs.train, tokens), session.device)
    scorer = Scorer(stage.compute, 1.0, vocabulary, backend)
    return SftWork(session, stage, inputs.train, inputs.heldout, scorer)


def policy_work(
    stage: GrpoStage, session: Session, inputs: PolicyInputs, given: PreTrainedModel | None
) -> Work:
    """Put together what GRPO does in a step; ``given`` is a reference passed from Python."""
    reference = make_reference(stage.reference, given, session.model, session.tokenizer)
    session.identity = {**session.identity, "reference": fingerprint(reference)}
    if (warning := caution(stage.anchor.build())) is not None:
        _tell(session, f"warning: {warning}")
    vocabulary = usable_vocabulary(session.model, session.tokenizer)
    tokens = head_of(session.model, vocabulary=vocabulary).tokens
    backend = head_backend(stage.compute, policy_logits(stage, tokens), session.device)
    scorer = Scorer(stage.compute, stage.rollout.temperature, vocabulary, backend)
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
        scorer=scorer,
        collector=Collector(
            model=session.model,
            tokenizer=session.tokenizer,
            prompts=inputs.train,
            rewards=inputs.rewards,
            sampling=sampling,
            prompts_per_step=stage.rollout.prompts_per_step,
            resample_equal_groups=stage.rollout.resample_equal_groups,
            seed=session.seed,
            log=session.run.log,
            precision=stage.compute.precision,
        ),
        controller=controller_of(stage.anchor),
        evaluator=_evaluator(stage, session, inputs, reference, scorer),
    )


def _evaluator(
    stage: GrpoStage,
    session: Session,
    inputs: PolicyInputs,
    reference: PreTrainedModel,
    scorer: Scorer,
) -> PolicyEvaluator | None:
    config = stage.evaluation
    if config is None or inputs.heldout is None:
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
        prompts=inputs.heldout,
        rewards=inputs.heldout_rewards,
        sampling=sampling,
        scorer=replace(scorer, temperature=config.temperature or 1.0),
        seed=session.seed,
        log=session.run.log,
    )


def _tell(session: Session, text: str) -> None:
    session.progress.say(text)
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
