"""The stages of a recipe, with their evaluations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field, model_validator

from kedge.objective import Adaptive
from kedge.training.config.critic import CriticConfig, GaeConfig
from kedge.training.config.experience import RewardsConfig, RolloutConfig
from kedge.training.config.inputs import ExamplesConfig, PromptsConfig, ReferenceConfig
from kedge.training.config.objective import (
    AdaptiveConfig,
    AdvantageConfig,
    AggregationConfig,
    AnchorConfig,
    CorrectionConfig,
    TrustRegionConfig,
)
from kedge.training.config.section import Name, NonNegative, Positive, Rate, Section
from kedge.training.config.updates import CheckpointConfig, ComputeConfig, OptimizerConfig

AT_THE_OLD_POLICY = (
    "with one update a step, when policy and critic still are those that the step began with; raise epochs or "
    "minibatches"
)


class SftEvaluationConfig(Section):
    """Held-out cross-entropy during SFT."""

    data: ExamplesConfig
    """Held-out examples."""
    every: Positive = 100
    """Steps between evaluations; there is always one at the start and at the end."""


class EvaluationConfig(Section):
    """Held-out prompts."""

    data: PromptsConfig
    every: Positive = 25
    """Steps between evaluations; there is always one at the start and at the end."""
    responses_per_prompt: Positive = 1
    temperature: Annotated[float, Field(ge=0)] = 1.0
    """0: greedy. KL and entropy are those of the policy at this temperature (at 1 when greedy)."""
    samples: NonNegative = 8
    """Prompts whose responses are kept, token by token, in samples.jsonl."""


class _Stage(Section):
    """What every stage has."""

    name: Name
    """The stage's folder in the run directory."""
    start: str | None = None
    """An earlier stage whose final policy this one starts from; the last one that trains the policy when left out."""
    steps: Positive
    """Steps of the stage."""
    optimizer: OptimizerConfig = OptimizerConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    compute: ComputeConfig = ComputeConfig()

    @model_validator(mode="after")
    def _warms_up(self) -> _Stage:
        _require_warm("optimizer", self.optimizer, self.steps)
        return self

    @property
    def updates_per_step(self) -> int:
        """Optimizer updates a step."""
        return 1


class SftStage(_Stage):
    """Supervised fine-tuning: minimise cross-entropy on the data, which is KL(data‖policy) up to H(data)."""

    method: Literal["sft"]
    data: ExamplesConfig
    batch_size: Positive = 64
    """Examples a step."""
    completion_only: bool = True
    """Learn the completion only; false: the prompt too."""
    max_tokens: Positive | None = None
    """Longest example, in tokens; longer ones are left out, counted and reported. The model's context when left out."""
    true_log_prob: str | None = None
    """`module:function`, log-probability of a completion under the data's true distribution, where it is known."""
    evaluation: SftEvaluationConfig | None = None

    @model_validator(mode="after")
    def _evaluates(self) -> SftStage:
        if self.true_log_prob is not None and self.evaluation is None:
            raise ValueError(
                "true_log_prob does nothing without evaluation, which splits the cross-entropy by it"
            )
        if self.true_log_prob is not None and not self.completion_only:
            raise ValueError(
                "true_log_prob is that of completions, and completion_only: false counts the prompts' tokens, too; "
                "leave one of them out"
            )
        return self


class PolicyStage(_Stage):
    """What policy optimisation has, whatever its advantages come from."""

    data: PromptsConfig
    rewards: RewardsConfig | None = None
    """Left out: the functions given from Python, each with weight 1."""
    anchor: AnchorConfig
    reference: ReferenceConfig | None = None
    rollout: RolloutConfig = RolloutConfig()
    trust_region: TrustRegionConfig = TrustRegionConfig()
    correction: CorrectionConfig = CorrectionConfig()
    aggregation: AggregationConfig = AggregationConfig()
    entropy_bonus: Annotated[float, Field(ge=0)] = 0.0
    """Coefficient of the exact entropy, in units of the advantage per nat."""
    epochs: Positive = 1
    """Passes over the responses of a step."""
    minibatches: Positive = 1
    """Updates an epoch. Where responses to one prompt are compared (GRPO, or anchor.baseline) each is on whole groups
    and the number divides rollout.prompts_per_step; else it divides the responses of a step."""
    old_kl_limit: Rate | None = None
    """Skip the rest of a step's updates once KL(old‖policy), exact, passes this many nats per token."""
    evaluation: EvaluationConfig | None = None

    def idle(self) -> Mapping[str, str]:
        """What compares the policy with the old one does nothing where they are the same at every update."""
        if self.updates_per_step > 1:
            return {}
        region = self.trust_region
        penalised = region.penalty is not None and region.penalty.beta > 0  # of 0, it measures
        settings = ("kind", "low", "high", "dual", "mask", *(("penalty",) if penalised else ()))
        weighted = ("anchor.weights",) if self.anchor.weights == "prefix" else ()
        names = ("old_kl_limit", *weighted, *(f"trust_region.{name}" for name in settings))
        return dict.fromkeys(names, AT_THE_OLD_POLICY)

    @model_validator(mode="after")
    def _sizes(self) -> PolicyStage:
        count = self.units_per_step
        if count % self.minibatches:
            divisors = [n for n in range(1, count + 1) if count % n == 0]
            near = sorted(sorted(divisors, key=lambda n: abs(n - self.minibatches))[:3])
            whole = f"rollout.prompts_per_step ({count}); a minibatch holds whole groups"
            what = whole if self.whole_groups else f"the responses of a step ({count})"
            raise ValueError(
                f"minibatches ({self.minibatches}) does not divide {what}. Near values that do: "
                f"{', '.join(map(str, near))}"
            )
        horizon = (
            self.anchor.controller.horizon if isinstance(self.anchor.controller, AdaptiveConfig) else None
        )
        if horizon is not None and horizon <= Adaptive.LIMIT * self.responses_per_step:
            raise ValueError(f"anchor.controller.{Adaptive.too_short(self.responses_per_step)}")
        if self.anchor.baseline and self.rollout.responses_per_prompt == 1:
            raise ValueError(
                "anchor.baseline averages the other responses to the prompt, and responses_per_prompt is 1: leave it "
                "out or raise responses_per_prompt"
            )
        return self

    @property
    def constant_length(self) -> int | None:
        """What sums over responses are divided by, with `aggregation.mode: constant`."""
        if self.aggregation.mode != "constant":
            return None
        return self.aggregation.constant_length or self.rollout.max_new_tokens

    @property
    def averaged_apart(self) -> str | None:
        """Say how β counts where the anchor is averaged in another way than what it is weighed against."""
        if self.anchor.placement == "reward" or self.anchor.controller.build().beta == 0:
            return None
        mode, per_token = self.aggregation.mode, self.anchor.unit == "nats/token"
        if mode == "constant" and per_token:
            return (
                f"the anchor is a mean over tokens, the reward's term is divided by {self.constant_length} tokens a "
                f"response (aggregation.mode: constant): β counts {self.constant_length}/mean length times; "
                "anchor.aggregation: response averages both alike"
            )
        if mode != "constant" and not per_token:
            return (
                "the anchor is a mean over responses of their whole KL, the reward's term a mean over tokens "
                f"(aggregation.mode: {mode}): β counts mean length times; aggregation.mode: constant averages both "
                "over responses, anchor.aggregation: token both over tokens"
            )
        return None

    @property
    def whole_groups(self) -> bool:
        """Whether all responses to a prompt must come in one update."""
        return self.anchor.baseline

    @property
    def units_per_step(self) -> int:
        """What minibatches divide: prompts with their groups, or responses."""
        return self.rollout.prompts_per_step if self.whole_groups else self.responses_per_step

    @property
    def measures_old(self) -> bool:
        """Whether a step keeps the old policy's hidden states, to measure exactly how far it has moved."""
        return self.old_kl_limit is not None or self.trust_region.measures_old

    @property
    def updates_per_step(self) -> int:
        """Optimizer updates a step: epochs × minibatches."""
        return self.epochs * self.minibatches

    @property
    def responses_per_step(self) -> int:
        """Responses a step: prompts × responses a prompt."""
        return self.rollout.prompts_per_step * self.rollout.responses_per_prompt


class GrpoStage(PolicyStage):
    """Group-relative policy optimisation: no critic, anchored to the reference."""

    method: Literal["grpo"]
    advantage: AdvantageConfig = AdvantageConfig()

    @property
    def whole_groups(self) -> bool:
        """Advantages compare the responses to a prompt."""
        return True

    @model_validator(mode="after")
    def _compares(self) -> GrpoStage:
        if self.advantage.kind == "batch" and self.rollout.resample_equal_groups:
            raise ValueError(
                "rollout.resample_equal_groups replaces groups whose equal rewards teach a comparison nothing; "
                "advantage.kind: batch compares them with the others: leave it out"
            )
        if self.advantage.kind != "batch" and self.rollout.responses_per_prompt == 1:
            raise ValueError(
                f"advantage.kind: {self.advantage.kind} compares the responses of one prompt and "
                "responses_per_prompt is 1: every advantage would be 0; raise it or use kind: batch"
            )
        return self


class PpoStage(PolicyStage):
    """Proximal policy optimisation: advantages from a critic, anchored to the reference."""

    method: Literal["ppo"]
    critic: CriticConfig = CriticConfig()
    advantage: GaeConfig = GaeConfig()

    def idle(self) -> Mapping[str, str]:
        """A critic that has not moved either has nothing to clip."""
        once = {"critic.clip": AT_THE_OLD_POLICY} if self.updates_per_step == 1 else {}
        return {**super().idle(), **once}

    @model_validator(mode="after")
    def _critic_warms_up(self) -> PpoStage:
        _require_warm("critic.optimizer", self.critic.optimizer, self.steps)
        return self

    @model_validator(mode="after")
    def _learns_from_all(self) -> PpoStage:
        if self.rollout.resample_equal_groups:
            raise ValueError(
                "rollout.resample_equal_groups replaces groups whose equal rewards teach a group advantage nothing; "
                "a critic learns from them: leave it out"
            )
        return self


def _require_warm(section: str, optimizer: OptimizerConfig, steps: int) -> None:
    if optimizer.warmup_steps > steps:
        raise ValueError(
            f"{section}.warmup_steps ({optimizer.warmup_steps}) is more than steps ({steps}): the learning rate would "
            "never be reached"
        )
