"""The sections on the critic: what it is, how its values become advantages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from pydantic import Field, model_validator

from kedge.training.config.section import Rate, Section
from kedge.training.config.updates import OptimizerConfig


class CriticConfig(Section):
    """What estimates the value of a state: the reward that is still to come, given prompt and tokens so far."""

    model: str | None = None
    """What the critic starts from: an earlier stage of `method: reward`, or the folder or hub name of a Hugging Face
    model with the policy's vocabulary: a reward model, whose score then is the first value of every state, or a causal
    language model, of which it takes the backbone. Left out: a copy of the policy's backbone at the stage's start."""
    shared: bool = False
    """The value head reads the policy's own hidden states instead: one backbone, one optimizer (the policy's), one
    loss."""
    coefficient: Rate | None = None
    """With `shared`: what the value loss is multiplied by where it joins the policy's; 0.5 when left out."""
    clip: Rate | None = 0.2
    """A value that has moved by more than this since the rollout earns nothing by moving on (PPO's value clipping);
    in units of the reward, so it wants to be of the size of the rewards' spread. null: not clipped."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """The critic's own."""

    def idle(self) -> Mapping[str, str]:
        """One backbone has one optimizer."""
        beside = (
            "with shared: one backbone has one optimizer, the stage's; the value loss joins the policy's loss times "
            "coefficient"
        )
        return {"optimizer": beside} if self.shared else {}

    @model_validator(mode="after")
    def _acts(self) -> CriticConfig:
        if self.shared and self.model is not None:
            raise ValueError(
                "model gives the critic a backbone of its own, and shared takes the policy's; keep one"
            )
        if not self.shared and self.coefficient is not None:
            raise ValueError(
                "coefficient does nothing without shared: a critic of its own has its own loss, whose strength is "
                "critic.optimizer.learning_rate"
            )
        return self


class GaeConfig(Section):
    """How rewards become advantages with a critic: generalised advantage estimation."""

    discount: Annotated[float, Field(gt=0, le=1)] = 1.0
    """γ: what a reward one token later is worth."""
    trace: Annotated[float, Field(ge=0, le=1)] = 0.95
    """λ: 1 takes the rewards to come as they are (no bias), 0 the critic's word for them (less variance)."""
    whiten: bool = True
    """Scale advantages to mean 0 and standard deviation 1 over all tokens of the step that are learnt from."""
