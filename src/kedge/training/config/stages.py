"""The stages of a recipe, with their evaluations."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from kedge.training.config.experience import RewardsConfig, RolloutConfig
from kedge.training.config.inputs import ExamplesConfig, PromptsConfig, ReferenceConfig
from kedge.training.config.objective import (
    AdvantageConfig,
    AggregationConfig,
    AnchorConfig,
    CorrectionConfig,
    TrustRegionConfig,
)
from kedge.training.config.section import Name, NonNegative, Positive, Rate, Section
from kedge.training.config.updates import CheckpointConfig, ComputeConfig, OptimizerConfig


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


class GrpoStage(_Stage):
    """Group-relative policy optimisation: no critic, anchored to the reference."""

    method: Literal["grpo"]
    data: PromptsConfig
    rewards: RewardsConfig | None = None
    """Left out: the functions given from Python, each with weight 1."""
    anchor: AnchorConfig
    reference: ReferenceConfig | None = None
    rollout: RolloutConfig = RolloutConfig()
    advantage: AdvantageConfig = AdvantageConfig()
    trust_region: TrustRegionConfig = TrustRegionConfig()
    correction: CorrectionConfig = CorrectionConfig()
    aggregation: AggregationConfig = AggregationConfig()
    entropy_bonus: Annotated[float, Field(ge=0)] = 0.0
    """Coefficient of the exact entropy, in reward units per nat."""
    epochs: Positive = 1
    """Passes over the responses of a step."""
    minibatches: Positive = 1
    """Updates an epoch, each on whole groups; divides rollout.prompts_per_step."""
    old_kl_limit: Rate | None = None
    """Skip the rest of a step's updates once KL(old‖policy), exact, passes this many nats per token."""
    evaluation: EvaluationConfig | None = None

    @model_validator(mode="after")
    def _sizes(self) -> GrpoStage:
        prompts = self.rollout.prompts_per_step
        if prompts % self.minibatches:
            divisors = [n for n in range(1, prompts + 1) if prompts % n == 0]
            near = sorted(sorted(divisors, key=lambda n: abs(n - self.minibatches))[:3])
            raise ValueError(
                f"minibatches ({self.minibatches}) does not divide rollout.prompts_per_step ({prompts}); a minibatch "
                f"holds whole groups. Near values that do: {', '.join(map(str, near))}"
            )
        if self.advantage.kind != "batch" and self.rollout.responses_per_prompt == 1:
            raise ValueError(
                f"advantage.kind: {self.advantage.kind} compares the responses of one prompt and "
                "responses_per_prompt is 1: every advantage would be 0; raise it or use kind: batch"
            )
        if self.old_kl_limit is not None and self.updates_per_step == 1:
            raise ValueError("old_kl_limit does nothing with one update a step; raise epochs or minibatches")
        return self

    @property
    def updates_per_step(self) -> int:
        """Optimizer updates a step: epochs × minibatches."""
        return self.epochs * self.minibatches

    @property
    def responses_per_step(self) -> int:
        """Responses a step: prompts × responses a prompt."""
        return self.rollout.prompts_per_step * self.rollout.responses_per_prompt
