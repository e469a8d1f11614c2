"""The parts of the policy loss, each with its refusals."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field, model_validator

from kedge.objective import (
    Adaptive,
    Anchor,
    Budget,
    Controller,
    Correction,
    DivergenceMask,
    Fixed,
    TrustRegion,
    refusal,
)
from kedge.training.config.section import Positive, Rate, Section, Unit


class AdvantageConfig(Section):
    """How rewards become advantages."""

    kind: Literal["group", "mean", "leave_one_out", "batch"] = "group"
    """group: (r − mean)/(std + ε) of the prompt's G responses (GRPO); mean: r − mean (Dr. GRPO);
    leave_one_out: r − mean of the other G − 1 (RLOO); batch: whitened over the batch (REINFORCE)."""
    std: Literal["population", "sample"] = "sample"
    """With group and batch: divide by G or by G − 1."""

    def idle(self) -> Mapping[str, str]:
        """Only two kinds divide by a standard deviation."""
        return {} if self.kind in ("group", "batch") else {"std": f"with kind: {self.kind}"}


class PenaltyConfig(Section):
    """β·KL(old‖policy), exact over the vocabulary, in the loss (PPO-Penalty)."""

    beta: Annotated[float, Field(ge=0)] = 1.0
    """β at the start, in units of the advantage per nat. 0: no penalty; its KL is measured all the same."""
    target: Rate | None = None
    """KL(old‖policy) of a whole step, in nats per token: β is halved after a step below target/1.5, doubled after one
    above 1.5 · target. Left out: β stays as it is."""

    @model_validator(mode="after")
    def _acts(self) -> PenaltyConfig:
        if self.beta == 0 and self.target is not None:
            raise ValueError("target does nothing with beta: 0, which stays 0 however often it is doubled")
        return self


class MaskConfig(Section):
    """Which tokens drop out of the surrogate once policy and old policy have come apart."""

    measure: Literal["tv", "kl"] = "tv"
    """tv: total variation, from 0 to 1; kl: KL(old‖policy), in nats."""
    threshold: Rate
    """How far is too far, at one token."""
    level: Literal["token", "response"] = "token"
    """token: the tokens that are too far and would be pushed on (DPPO); response: whole responses, by their farthest
    token (Trust Region Masking)."""
    form: Literal["exact", "two_outcome"] = "exact"
    """exact: over the whole vocabulary; two_outcome: the sampled token against all others."""

    @model_validator(mode="after")
    def _meaningful(self) -> MaskConfig:
        self.build()
        return self

    def build(self) -> DivergenceMask:
        """Give the objective's own type."""
        return DivergenceMask(
            measure=self.measure, threshold=self.threshold, level=self.level, form=self.form
        )


class TrustRegionConfig(Section):
    """What keeps a step small: the tie to the old policy. Ratio, penalty and mask act together or alone."""

    kind: Literal["clip", "sequence", "cispo", "none"] = "clip"
    """clip: per-token ratio (PPO, GRPO); sequence: one ratio a response (GSPO); cispo; none: unclipped ratio."""
    low: Annotated[float, Field(gt=0, le=1)] = 0.2
    """The ratio is clipped below 1 − low."""
    high: Rate = 0.2
    """The ratio is clipped above 1 + high."""
    dual: Annotated[float, Field(gt=1)] | None = None
    """With clip and sequence: for negative advantages the surrogate is at least dual × advantage."""
    penalty: PenaltyConfig | None = None
    mask: MaskConfig | None = None

    def idle(self) -> Mapping[str, str]:
        """Nothing is clipped without a kind."""
        return dict.fromkeys(("low", "high"), "with kind: none") if self.kind == "none" else {}

    @model_validator(mode="after")
    def _acts(self) -> TrustRegionConfig:
        if self.dual is not None and self.kind not in ("clip", "sequence"):
            raise ValueError(f"dual does nothing with kind: {self.kind}")
        return self

    def build(self) -> TrustRegion:
        """Give the objective's own type."""
        return TrustRegion(kind=self.kind, low=self.low, high=self.high, dual=self.dual)

    @property
    def measures_old(self) -> bool:
        """Whether it measures how far the policy is from the old one over the whole vocabulary."""
        return self.penalty is not None or (self.mask is not None and self.mask.form == "exact")


class CorrectionConfig(Section):
    """Weights for the mismatch between the engine that sampled and the trainer (old policy / sampler)."""

    kind: Literal["none", "truncate", "mask"] = "none"
    """truncate: weights cut at `high`; mask: tokens whose weight leaves [low, high] are dropped."""
    level: Literal["token", "sequence"] = "token"
    """One weight a token, or one a response."""
    low: Annotated[float, Field(ge=0)] = 0.5
    high: Rate = 2.0

    def idle(self) -> Mapping[str, str]:
        """A weight that is not used has no level, one that is cut no lower bound."""
        unused = {"none": ("level", "low", "high"), "truncate": ("low",)}.get(self.kind, ())
        return dict.fromkeys(unused, f"with kind: {self.kind}")

    @model_validator(mode="after")
    def _acts(self) -> CorrectionConfig:
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

    def build(self) -> Controller:
        """Give the objective's own type."""
        return Fixed(beta=self.beta)

    @property
    def goal(self) -> None:
        """No KL is aimed at."""

    @property
    def in_words(self) -> str:
        """What sets β."""
        return f"β fixed at {self.beta:g}"


class AdaptiveConfig(Section):
    """β follows KL/target with limited steps (Ziegler et al. 2019)."""

    kind: Literal["adaptive"]
    beta: Rate = 0.1
    """At the start."""
    target: Rate
    """The exact KL to hold, in the anchor's direction and in `unit`."""
    horizon: Rate = 10_000.0
    """Responses over which β adapts."""
    unit: Unit = "nats/token"

    def build(self) -> Controller:
        """Give the objective's own type."""
        return Adaptive(beta=self.beta, target=self.target, horizon=self.horizon, unit=self.unit)

    @property
    def goal(self) -> float:
        """The KL that is aimed at, in `unit`."""
        return self.target

    @property
    def in_words(self) -> str:
        """What sets β."""
        return f"β adapted to {self.target:g} {self.unit}"


class BudgetConfig(Section):
    """The constraint KL ≤ budget itself, of the exact KL in the anchor's direction; β is solved for."""

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

    @model_validator(mode="after")
    def _possible(self) -> BudgetConfig:
        try:
            self.build()
        except ValueError as error:
            raise ValueError(f"{error}; give beta, low and high so that they fit") from None
        return self

    def build(self) -> Controller:
        """Give the objective's own type."""
        names = ("beta", "low", "high")
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        return Budget(budget=self.budget, unit=self.unit, **given)

    @property
    def goal(self) -> float:
        """The KL that is not to be passed, in `unit`."""
        return self.budget

    @property
    def in_words(self) -> str:
        """What sets β."""
        return f"β solved for a budget of {self.budget:g} {self.unit}"


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

    @property
    def measured(self) -> str:
        """The metric that the controller goes by: the exact KL in the anchor's direction."""
        if isinstance(self.controller, FixedConfig):
            return "kl/policy_reference/exact"
        pair = "policy_reference" if self.direction == "reverse" else "reference_policy"
        return f"kl/{pair}/exact" + ("_per_response" if self.controller.unit == "nats/response" else "")


class AggregationConfig(Section):
    """How per-token terms of the policy loss become one number."""

    mode: Literal["token_mean", "sequence_mean", "constant"] = "token_mean"
    """Mean over the update's response tokens; mean of each response's mean; sum over responses' tokens divided
    by `constant_length` and the number of responses (Dr. GRPO)."""
    constant_length: Positive | None = None
    """With constant: a length in tokens; max_new_tokens when left out. An anchor in nats/response is divided by it too,
    so that β stays reward per nat."""

    @model_validator(mode="after")
    def _acts(self) -> AggregationConfig:
        if self.mode != "constant" and self.constant_length is not None:
            raise ValueError(f"constant_length does nothing with mode: {self.mode}")
        return self
