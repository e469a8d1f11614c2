"""The typed tree that a recipe is validated against.

Every field states its unit. A field acts or is refused: what means nothing is rejected here, with the reason.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from kedge.objective import Anchor, Correction, TrustRegion, refusal

Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(gt=0)]
Unit = Literal["nats/token", "nats/response"]


class Section(BaseModel):
    """A part of a recipe: unknown keys are errors, types are not guessed, values do not change later."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


class BpeConfig(Section):
    """A byte-level BPE tokenizer trained on the spot."""

    data: DataConfig
    """Rows whose prompts and completions it is trained on."""
    vocab_size: Positive = 2048
    """Entries of the vocabulary."""


class TokenizerConfig(Section):
    """Where the tokenizer comes from: exactly one of the three."""

    path: str | None = None
    """A Hugging Face name or folder."""
    task: str | None = None
    """The tokenizer of an embedded task, `sums` or `prose`."""
    bpe: BpeConfig | None = None
    """Train one."""

    @model_validator(mode="after")
    def _exactly_one(self) -> TokenizerConfig:
        if sum(x is not None for x in (self.path, self.task, self.bpe)) != 1:
            raise ValueError("give exactly one of path, task, bpe")
        return self


class BuildConfig(Section):
    """A model made on the spot with random weights (drawn from the recipe's seed)."""

    architecture: Literal["llama", "qwen3", "gemma2", "gpt2", "mistral"] = "llama"
    """The Hugging Face architecture."""
    hidden_size: Positive = 128
    """Width H."""
    layers: Positive = 4
    """Transformer blocks."""
    heads: Positive = 4
    """Attention heads; divides hidden_size."""
    intermediate_size: Positive | None = None
    """Width of the feed-forward block; 3 × hidden_size when left out."""
    context: Positive = 128
    """Longest sequence, in tokens."""


class ModelConfig(Section):
    """The policy at the start of the first stage: `path`, or `build` with `tokenizer`, or an object in memory."""

    path: str | None = None
    """A Hugging Face causal language model: name or folder."""
    build: BuildConfig | None = None
    """Make one."""
    tokenizer: TokenizerConfig | None = None
    """Needed with `build`; with `path` the model's own is used when left out."""
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """Type of the weights. Training wants float32 weights; see `precision` for bfloat16 arithmetic."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""

    @model_validator(mode="after")
    def _one_source(self) -> ModelConfig:
        if self.path is not None and self.build is not None:
            raise ValueError("path and build exclude each other")
        if self.build is not None and self.tokenizer is None:
            raise ValueError("a model that is built needs a tokenizer: add tokenizer: {task: …} or {bpe: …}")
        if self.build is not None and (self.revision is not None or self.trust_remote_code):
            raise ValueError("revision and trust_remote_code belong to path")
        return self


class DataConfig(Section):
    """Rows: an embedded task, a file (JSONL, JSON, Parquet) or a name that `datasets` loads."""

    task: str | None = None
    """`sums` or `prose`."""
    path: str | None = None
    """A file, or a dataset's name."""
    split: str | None = None
    """`train` or `heldout` of a task (default `train`); the split's name of a dataset."""
    count: Positive | None = None
    """Rows made by a task (default 4096) or taken from a file, from its start (default all)."""
    prompt: str = "{prompt}"
    """How a row becomes a prompt; columns in braces. Exactly one column in braces may hold chat messages."""
    completion: str = "{completion}"
    """How a row becomes a completion (SFT only)."""

    @model_validator(mode="after")
    def _one_source(self) -> DataConfig:
        if (self.task is None) == (self.path is None):
            raise ValueError("give exactly one of task, path")
        return self


class OptimizerConfig(Section):
    """AdamW with a schedule."""

    learning_rate: Rate = 1e-5
    """Peak learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """After the warm-up: constant, or down to `final_fraction` of the peak at the last step."""
    warmup_steps: NonNegative = 0
    """Steps of linear warm-up."""
    final_fraction: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Where linear and cosine schedules end, as a fraction of the peak."""
    betas: Annotated[list[float], Field(min_length=2, max_length=2)] = [0.9, 0.95]
    """Decay of the two moments."""
    eps: Rate = 1e-8
    """Added to the root of the second moment."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled decay, on matrices only."""
    max_gradient_norm: Rate | None = 1.0
    """Gradients are clipped to this global norm; null: not clipped."""

    @model_validator(mode="after")
    def _acts(self) -> OptimizerConfig:
        if self.schedule == "constant" and self.final_fraction != 0.0:
            raise ValueError("final_fraction does nothing with a constant schedule")
        return self


class CheckpointConfig(Section):
    """What a killed run resumes from."""

    every: Positive = 50
    """Steps between checkpoints; there is always one at the end."""
    keep: Positive = 2
    """How many of the latest stay; the best by evaluation stays beside them."""


class ComputeConfig(Section):
    """How the same numbers are computed; changes nothing but speed and memory (and rounding)."""

    micro_batch: Positive = 64
    """Sequences in one forward and backward pass; gradients add up over the passes of an update."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of the transformer blocks; weights, logits, losses and optimizer stay as they are."""
    layout: Literal["padded", "packed"] = "padded"
    """One padded rectangle a pass, or all sequences end to end in one row."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    head_chunk_rows: Positive | None = None
    """Rows of logits that exist at a time; chosen by shape when left out."""


class SftEvaluationConfig(Section):
    """Held-out cross-entropy during SFT."""

    data: DataConfig
    """Held-out examples."""
    every: Positive = 100
    """Steps between evaluations; there is always one at the start and at the end."""


class _Stage(Section):
    """What every stage has."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """The stage's folder in the run directory."""
    start: str | None = None
    """An earlier stage whose final model this one starts from; the stage before it when left out."""
    steps: Positive
    """Steps of the stage."""
    optimizer: OptimizerConfig = OptimizerConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    compute: ComputeConfig = ComputeConfig()


class SftStage(_Stage):
    """Supervised fine-tuning: minimise cross-entropy on the data, which is KL(data‖policy) up to H(data)."""

    method: Literal["sft"]
    data: DataConfig
    batch_size: Positive = 64
    """Examples a step."""
    completion_only: bool = True
    """Learn the completion only; false: the prompt too."""
    max_tokens: Positive | None = None
    """Longest example, in tokens; longer ones are left out, counted and reported. The model's context when left out."""
    true_log_prob: str | None = None
    """`module:function`, log-probability of a completion under the data's true distribution, where it is known."""
    evaluation: SftEvaluationConfig | None = None


class RewardConfig(Section):
    """One reward function, called as `reward(prompts, completions, **columns) -> list[float | None]`."""

    function: str | None = None
    """`module:function` or `path.py:function`; left out for one given from Python under the same name."""
    name: str | None = None
    """Its name in metrics; the function's name when left out."""
    weight: float = 1.0
    """Its weight in the sum; 0 measures without rewarding."""


class RewardsConfig(Section):
    """The reward functions and what happens when one fails."""

    functions: Annotated[list[RewardConfig], Field(min_length=1)]
    time_limit: Rate | None = 60.0
    """Seconds for one call; null: no limit."""
    on_error: Literal["stop", "drop"] = "stop"
    """stop: save and stop. drop: score one by one and count the culprits as unscorable."""
    max_consecutive_drops: Positive = 8
    """With `drop`: this many steps in a row with a culprit stop the run."""

    @model_validator(mode="after")
    def _acts(self) -> RewardsConfig:
        if self.on_error == "stop" and "max_consecutive_drops" in self.model_fields_set:
            raise ValueError("max_consecutive_drops does nothing with on_error: stop")
        return self


class RolloutConfig(Section):
    """What the policy is asked to write in a step."""

    prompts_per_step: Positive = 16
    """Prompts B."""
    responses_per_prompt: Positive = 8
    """Responses a prompt, G."""
    max_new_tokens: Positive = 64
    """Longest response, in tokens."""
    max_prompt_tokens: Positive | None = None
    """Longer prompts are left out, counted and reported; without it, one that leaves no room for a response is an
    error."""
    temperature: Rate = 1.0
    """Sampling temperature; the policy is the tempered policy, in the ratio and in every KL."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Must stay 1: see the refusal."""
    stop: list[str] = []
    """Strings that end a response; they stay part of it."""
    truncated: Literal["keep", "mask", "penalise"] = "mask"
    """Responses cut by the length limit: rewarded like others, left out of the policy loss, or penalised."""
    truncation_penalty: Annotated[float, Field(gt=0)] | None = None
    """With `penalise`: taken from the reward of a response that was cut."""
    resample_equal_groups: NonNegative = 0
    """Times that prompts whose responses all got equal rewards are replaced by fresh ones (DAPO)."""

    @model_validator(mode="after")
    def _meaningful(self) -> RolloutConfig:
        if self.top_p < 1:
            raise ValueError(
                "top_p below 1 draws from a truncated policy while ratio and KL are those of the whole one, "
                "biased by the kept mass; set top_p: 1.0 and use temperature"
            )
        if (self.truncated == "penalise") != (self.truncation_penalty is not None):
            raise ValueError("truncation_penalty goes with truncated: penalise, and only with it")
        return self


class AdvantageConfig(Section):
    """How rewards become advantages."""

    kind: Literal["group", "mean", "leave_one_out", "batch"] = "group"
    """group: (r − mean)/(std + ε) of the prompt's G responses (GRPO); mean: r − mean (Dr. GRPO);
    leave_one_out: r − mean of the other G − 1 (RLOO); batch: whitened over the batch (REINFORCE)."""
    std: Literal["population", "sample"] = "sample"
    """With group and batch: divide by G or by G − 1."""

    @model_validator(mode="after")
    def _acts(self) -> AdvantageConfig:
        if self.kind in ("mean", "leave_one_out") and "std" in self.model_fields_set:
            raise ValueError(f"std does nothing with kind: {self.kind}")
        return self


class TrustRegionConfig(Section):
    """What keeps a step small: the tie to the old policy."""

    kind: Literal["clip", "sequence", "cispo", "none"] = "clip"
    """clip: per-token ratio (PPO, GRPO); sequence: one ratio a response (GSPO); cispo; none: unclipped ratio."""
    low: Annotated[float, Field(gt=0, le=1)] = 0.2
    """The ratio is clipped below 1 − low."""
    high: Rate = 0.2
    """The ratio is clipped above 1 + high."""
    dual: Annotated[float, Field(gt=1)] | None = None
    """With clip: for negative advantages the surrogate is at least dual × advantage."""

    @model_validator(mode="after")
    def _acts(self) -> TrustRegionConfig:
        if self.kind == "none" and {"low", "high"} & self.model_fields_set:
            raise ValueError("low and high do nothing with kind: none")
        if self.dual is not None and self.kind != "clip":
            raise ValueError(f"dual does nothing with kind: {self.kind}")
        return self

    def build(self) -> TrustRegion:
        """Give the objective's own type."""
        return TrustRegion(kind=self.kind, low=self.low, high=self.high, dual=self.dual)


class CorrectionConfig(Section):
    """Weights for the mismatch between the engine that sampled and the trainer (old policy / sampler)."""

    kind: Literal["none", "truncate", "mask"] = "none"
    """truncate: weights cut at `high`; mask: tokens whose weight leaves [low, high] are dropped."""
    level: Literal["token", "sequence"] = "token"
    """One weight a token, or one a response."""
    low: Annotated[float, Field(ge=0)] = 0.5
    high: Rate = 2.0

    @model_validator(mode="after")
    def _acts(self) -> CorrectionConfig:
        if self.kind == "none" and self.model_fields_set - {"kind"}:
            raise ValueError("level, low and high do nothing with kind: none")
        if self.kind == "truncate" and "low" in self.model_fields_set:
            raise ValueError("low does nothing with kind: truncate")
        if self.kind == "mask" and self.low >= self.high:
            raise ValueError(f"low ({self.low}) must be below high ({self.high})")
        return self

    def build(self) -> Correction:
        """Give the objective's own type."""
        return Correction(kind=self.kind, level=self.level, low=self.low, high=self.high)


class FixedConfig(Section):
    """A constant β."""

    kind: Literal["fixed"]
    beta: Annotated[float, Field(ge=0)]
    """0: no anchor; its KL is measured all the same."""


class AdaptiveConfig(Section):
    """β follows KL/target with limited steps (Ziegler et al. 2019)."""

    kind: Literal["adaptive"]
    beta: Rate = 0.1
    """At the start."""
    target: Rate
    """KL to hold, in `unit`."""
    horizon: Rate = 10_000.0
    """Responses over which β adapts."""
    unit: Unit = "nats/token"


class BudgetConfig(Section):
    """The constraint KL ≤ budget itself; β is solved for."""

    kind: Literal["budget"]
    budget: Rate
    """How far the policy may go, in `unit`."""
    unit: Unit = "nats/token"
    beta: Rate | None = None
    """β at the start; 1 for nats/token and 0.1 for nats/response when left out."""
    low: Rate | None = None
    """Lower bound of β; a hundredth of its start when left out."""
    high: Rate | None = None
    """Upper bound of β; a hundred times its start when left out."""


class AnchorConfig(Section):
    """The tie to the reference: measure × placement × gradient, and what sets β."""

    measure: Literal["exact", "k1", "k2", "k3"] = "exact"
    """exact: over the whole vocabulary; k1, k2, k3: from the sampled token's log-probability."""
    direction: Literal["reverse", "forward"] = "reverse"
    """reverse: KL(policy‖reference), mode-seeking; forward: KL(reference‖policy), mode-covering."""
    placement: Literal["loss", "reward"] = "loss"
    """Added to the loss or taken from the reward."""
    gradient: Literal["published", "token", "sequence"] = "token"
    """published: as the papers differentiate it; token: right per state; sequence: right for the response."""
    weights: Literal["none", "prefix"] = "none"
    """With sequence: importance weights of the prefix, which make it exact off-policy (and noisy)."""
    baseline: bool = False
    """With sequence: subtract the other responses' KL to go at the same position (less variance, same mean)."""
    aggregation: Literal["token", "response"] | None = None
    """Mean over all tokens, or sum over a response's tokens and mean over responses; follows the budget's
    or target's unit when left out, else token."""
    controller: Annotated[FixedConfig | AdaptiveConfig | BudgetConfig, Field(discriminator="kind")]

    @model_validator(mode="after")
    def _meaningful(self) -> AnchorConfig:
        if reason := refusal(self.build()):
            raise ValueError(reason)
        if self.placement == "reward" and self.aggregation is not None:
            raise ValueError("aggregation does nothing with placement: reward; rewards are per response")
        return self

    def build(self) -> Anchor:
        """Give the objective's own type."""
        return Anchor(
            measure=self.measure,
            direction=self.direction,
            placement=self.placement,
            gradient=self.gradient,
            weights=self.weights,
            baseline=self.baseline,
        )

    @property
    def unit(self) -> Unit:
        """The unit of the KL that the penalty sums: it follows aggregation, else the controller."""
        if self.aggregation is not None:
            return "nats/token" if self.aggregation == "token" else "nats/response"
        return self.controller.unit if not isinstance(self.controller, FixedConfig) else "nats/token"


class AggregationConfig(Section):
    """How per-token terms of the policy loss become one number."""

    mode: Literal["token_mean", "sequence_mean", "constant"] = "token_mean"
    """Mean over the update's response tokens; mean of each response's mean; sum over responses' tokens divided
    by `constant_length` and the number of responses (Dr. GRPO)."""
    constant_length: Positive | None = None
    """With constant: a length in tokens; max_new_tokens when left out."""

    @model_validator(mode="after")
    def _acts(self) -> AggregationConfig:
        if self.mode != "constant" and self.constant_length is not None:
            raise ValueError(f"constant_length does nothing with mode: {self.mode}")
        return self


class EvaluationConfig(Section):
    """Held-out prompts."""

    data: DataConfig
    every: Positive = 25
    """Steps between evaluations; there is always one at the start and at the end."""
    responses_per_prompt: Positive = 1
    temperature: Annotated[float, Field(ge=0)] = 1.0
    """0: greedy. KL and entropy are those of the policy at this temperature (at 1 when greedy)."""
    samples: NonNegative = 8
    """Prompts whose responses are kept, token by token, in samples.jsonl."""


class ReferenceConfig(Section):
    """What the policy is anchored to; a frozen copy of the policy at the stage's start when left out."""

    path: str
    """A Hugging Face model with the same vocabulary."""


class GrpoStage(_Stage):
    """Group-relative policy optimisation: no critic, anchored to the reference."""

    method: Literal["grpo"]
    data: DataConfig
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


Stage = Annotated[SftStage | GrpoStage, Field(discriminator="method")]


class Recipe(Section):
    """A whole run: a model and the stages that train it, one after the other."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    out: str | None = None
    """The run directory; runs/<name> when left out."""
    seed: NonNegative = 0
    """Equal seeds give equal runs on CPU."""
    device: str = "auto"
    """auto: CUDA if there is one, else the CPU; or a PyTorch device."""
    model: ModelConfig = ModelConfig()
    stages: Annotated[list[Stage], Field(min_length=1)]
    sinks: list[Literal["tensorboard", "wandb", "trackio"]] = []
    """Where metrics go besides the run directory."""
    resume: bool = False
    """Go on with the run in `out` from its last checkpoint."""

    @model_validator(mode="after")
    def _chain(self) -> Recipe:
        seen: list[str] = []
        for stage in self.stages:
            if stage.name in seen:
                raise ValueError(f"two stages are called {stage.name!r}")
            if stage.start is not None and stage.start not in seen:
                raise ValueError(
                    f"stage {stage.name!r} starts from {stage.start!r}, which is no earlier stage"
                    + (f" (there are: {', '.join(seen)})" if seen else "")
                )
            seen.append(stage.name)
        return self

    @property
    def directory(self) -> str:
        """Where the run is written."""
        return self.out if self.out is not None else f"runs/{self.name}"

    def dump(self) -> dict[str, Any]:
        """Give the resolved recipe as plain data, without `resume`, which is no property of a run."""
        return self.model_dump(mode="json", exclude={"resume"})


BpeConfig.model_rebuild()
