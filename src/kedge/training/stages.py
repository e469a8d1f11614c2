"""One stage of a recipe, put together: inputs, reference, and the work that the loop runs."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from torch import nn
from transformers import PreTrainedModel

from kedge.errors import UserError
from kedge.models import (
    Critic,
    critic_beside,
    disable_activation_checkpointing,
    enable_activation_checkpointing,
    fingerprint,
    head_of,
    reward_model_of,
    save_model,
    special_tokens,
    usable_vocabulary,
)
from kedge.objective import Controller, Fixed, HalvingDoubling, caution
from kedge.runs import RunDirectory, atomic_directory, environment
from kedge.runs.interrupt import Interrupt
from kedge.training.backend import head_backend, policy_logits, sft_logits
from kedge.training.collect import Collector, sampling_of
from kedge.training.config import (
    GrpoStage,
    PenaltyConfig,
    PolicyStage,
    PpoStage,
    RewardStage,
    SftStage,
    Stage,
)
from kedge.training.critic import CriticWork
from kedge.training.evaluation import PolicyEvaluator
from kedge.training.inputs import Inputs, Materials, PolicyInputs, RewardInputs, SftInputs, require_room
from kedge.training.loop import Session, Work, run_loop
from kedge.training.optimization import Updater
from kedge.training.policy import PolicyWork
from kedge.training.progress import Progress
from kedge.training.resources import make_critic, make_reference, make_scorer
from kedge.training.reward_model import RewardWork
from kedge.training.scoring import Scorer
from kedge.training.sft import SftWork


def run_stage(
    stage: Stage,
    inputs: Inputs,
    materials: Materials,
    run: RunDirectory,
    progress: Progress,
    interrupt: Interrupt,
) -> None:
    """Train ``materials.model`` in place through one stage, from where the run directory says it is.

    A reward stage trains a model of its own and leaves that one as it is.
    """
    model, tokenizer, trained = materials.model, materials.tokenizer, "policy"
    if isinstance(inputs, RewardInputs):
        assert isinstance(stage, RewardStage)
        model, tokenizer = make_scorer(stage, model, tokenizer, materials.seed), inputs.tokenizer
        trained = "reward model"
    checkpointing = stage.compute.activation_checkpointing
    (enable_activation_checkpointing if checkpointing else disable_activation_checkpointing)(model)
    session = Session(
        stage=stage,
        model=model,
        tokenizer=tokenizer,
        device=materials.device,
        seed=materials.seed,
        run=run,
        progress=progress,
        interrupt=interrupt,
        identity={f"{trained} at the start": fingerprint(model)},
    )
    for note in inputs.notes:
        _tell(session, f"note: {note}")
    if isinstance(stage, SftStage):
        assert isinstance(inputs, SftInputs)
        work = sft_work(stage, session, inputs)
    elif isinstance(stage, RewardStage):
        assert isinstance(inputs, RewardInputs)
        work = RewardWork(session, stage, inputs.train, inputs.heldout)
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
    try:
        run_loop(session, work)
    finally:
        for reward in inputs.reward_models if isinstance(inputs, PolicyInputs) else ():
            reward.unload()


def sft_work(stage: SftStage, session: Session, inputs: SftInputs) -> Work:
    """Put together what SFT does in a step."""
    vocabulary = usable_vocabulary(session.model, session.tokenizer)
    tokens = head_of(session.model, vocabulary=vocabulary).tokens
    backend = head_backend(stage.compute, sft_logits(stage, inputs.train, tokens), session.device)
    scorer = Scorer(stage.compute, 1.0, vocabulary, backend)
    return SftWork(session, stage, inputs.train, inputs.heldout, scorer)


def policy_work(
    stage: GrpoStage | PpoStage, session: Session, inputs: PolicyInputs, given: PreTrainedModel | None
) -> Work:
    """Put together what GRPO or PPO does in a step; ``given`` is a reference passed from Python."""
    reference = make_reference(stage.reference, given, session.model, session.tokenizer)
    session.identity = {
        **session.identity,
        "reference": fingerprint(reference),
        **_load_reward_models(stage, session, inputs),
    }
    rescaled = isinstance(stage, GrpoStage) and stage.advantage.kind in ("group", "batch")
    if (warning := caution(stage.anchor.build(), rescaled=rescaled)) is not None:
        _tell(session, f"warning: {warning}")
    if (apart := stage.averaged_apart) is not None:
        _tell(session, f"note: {apart}")
    vocabulary = usable_vocabulary(session.model, session.tokenizer)
    tokens = head_of(session.model, vocabulary=vocabulary).tokens
    backend = head_backend(stage.compute, policy_logits(stage, tokens), session.device)
    scorer = Scorer(
        stage.compute, stage.rollout.temperature, tokens, backend
    )  # the reference may have more rows
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
            rollout=stage.rollout,
            seed=session.seed,
            log=session.run.log,
            precision=stage.compute.precision,
        ),
        controller=stage.anchor.controller.build(),
        evaluator=_evaluator(stage, session, inputs, reference, scorer),
        penalty=penalty_of(stage.trust_region.penalty),
        critic=critic_work(stage, session, scorer, inputs) if isinstance(stage, PpoStage) else None,
    )


def critic_work(stage: PpoStage, session: Session, scorer: Scorer, inputs: PolicyInputs) -> CriticWork:
    """Make the critic and have it trained: by an optimizer of its own, or by the policy's on a shared backbone."""
    policy = session.model
    critic = (
        critic_beside(policy, shared=stage.critic.shared)
        if inputs.critic is None
        else make_critic(inputs.critic, policy, session.tokenizer)
    )
    if critic.backbone is not None:
        require_room("critic", critic.backbone, inputs.longest)
    if critic.backbone is not None and stage.compute.activation_checkpointing:
        enable_activation_checkpointing(critic.backbone)
    work = CriticWork(critic, stage.critic, scorer, stage.steps)
    if work.updater is not None:
        session.other_updaters.append(work.updater)
        session.at_the_end.append(partial(leave_critic, session, critic))
    else:
        session.updater = Updater(nn.ModuleList([policy, critic]), stage.optimizer, stage.steps)
    return work


def leave_critic(session: Session, critic: Critic) -> None:
    """Write the final critic as a sequence classifier, which ``critic.model`` and a reward can name."""
    pad, ends = special_tokens(session.model, session.tokenizer)
    try:
        model = reward_model_of(critic, pad_id=pad, end_ids=ends)
    except UserError as error:
        _tell(session, f"note: the critic stays in the checkpoint and is not written as a model: {error}")
        return
    with atomic_directory(session.run.path / "critic") as scratch:
        save_model(model, session.tokenizer, scratch)


def _load_reward_models(stage: PolicyStage, session: Session, inputs: PolicyInputs) -> dict[str, str]:
    """Load the reward models among the rewards, beside the policy; give their hashes."""
    found = {}
    for reward in inputs.reward_models:
        reward.load(session.device, session.model.dtype)
        reward.require_room(inputs.longest + bool(stage.rollout.stop))  # an end token behind the stop string
        if reward.tokenizer is not None:
            _tell(
                session,
                f"note: reward model {reward.name!r} has another tokenizer than the policy: it reads prompts and "
                "responses through their text",
            )
        assert reward.model is not None
        found[f"reward model {reward.name!r}"] = fingerprint(reward.model)
    return found


def _evaluator(
    stage: PolicyStage,
    session: Session,
    inputs: PolicyInputs,
    reference: PreTrainedModel,
    scorer: Scorer,
) -> PolicyEvaluator | None:
    config = stage.evaluation
    if config is None or inputs.heldout is None:
        return None
    sampling = replace(
        sampling_of(stage.rollout),
        responses_per_prompt=config.responses_per_prompt,
        temperature=config.temperature,
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


def penalty_of(penalty: PenaltyConfig | None) -> Controller | None:
    """Make what sets β of the trust region's penalty."""
    if penalty is None:
        return None
    if penalty.target is None:
        return Fixed(beta=penalty.beta)
    return HalvingDoubling(beta=penalty.beta, target=penalty.target)
