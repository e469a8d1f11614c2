"""The stage that trains a reward model, with its data."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from kedge.training.config.inputs import PromptsConfig
from kedge.training.config.section import Positive, Section
from kedge.training.config.stages import _Stage


class PairsConfig(PromptsConfig):
    """Prompts with two responses, from the same sources.

    A column `margin`, if there is one, says by how much the scores should differ.
    """

    chosen: str = "{chosen}"
    """How a row becomes the preferred response."""
    rejected: str = "{rejected}"
    """How a row becomes the other one."""


class RewardEvaluationConfig(Section):
    """Held-out accuracy and calibration of a reward model."""

    data: PairsConfig
    """Held-out pairs."""
    every: Positive = 100
    """Steps between evaluations; there is always one at the start and at the end."""


class RewardStage(_Stage):
    """Reward model: minimise −log σ(r(chosen) − r(rejected) − margin), the Bradley–Terry loss.

    The policy stays as it is; later stages name this one in `rewards.functions`.
    """

    method: Literal["reward"]
    data: PairsConfig
    path: str | None = None
    """A Hugging Face sequence classifier with one label to train on; left out: the backbone of the policy that the
    stage starts from, under a fresh head."""
    batch_size: Positive = 64
    """Pairs a step."""
    max_tokens: Positive | None = None
    """Longest sequence (prompt and response), in tokens; pairs with a longer one are left out, counted and reported.
    The model's context when left out."""
    true_preference: str | None = None
    """`module:function`, probability that the judge who labelled the pairs prefers the first of two responses, where
    it is known: gives the best possible accuracy."""
    evaluation: RewardEvaluationConfig | None = None

    @model_validator(mode="after")
    def _acts(self) -> RewardStage:
        if self.path is not None and self.start is not None:
            raise ValueError("start and path exclude each other: both say what the reward model is made from")
        if self.true_preference is not None and self.evaluation is None:
            raise ValueError("true_preference does nothing without evaluation")
        defaults = type(self.compute).model_fields
        for name in ("compile_head", "head_chunk_rows"):
            if getattr(self.compute, name) != defaults[name].default:
                raise ValueError(
                    f"compute.{name} does nothing here: a reward model has no head over a vocabulary"
                )
        if self.compute.micro_batch < 2:
            raise ValueError("compute.micro_batch counts sequences and a pair has two: give 2 or more")
        return self
