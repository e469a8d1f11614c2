"""The sections on responses: how they are sampled, how rewarded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field, model_validator

from kedge.training.config.section import NonNegative, Positive, Rate, Section


class RewardConfig(Section):
    """One reward: a function, called as `reward(prompts, completions, **columns) -> list[float | None]`, or a model."""

    function: str | None = None
    """`module:function` or `path.py:function`; left out for one given from Python under the same name."""
    model: str | None = None
    """A reward model in its place: an earlier stage of `method: reward`, or the folder or hub name of a Hugging Face
    sequence classifier with one label."""
    name: str | None = None
    """Its name in metrics; the function's, stage's or folder's name when left out."""
    micro_batch: Positive | None = None
    """With `model`: sequences scored in one pass; those of `compute.micro_batch` when left out."""
    weight: float = 1.0
    """Its weight in the sum; 0 measures without rewarding."""

    @model_validator(mode="after")
    def _one_source(self) -> RewardConfig:
        if self.function is not None and self.model is not None:
            raise ValueError("function and model exclude each other; list them as two entries")
        if self.micro_batch is not None and self.model is None:
            raise ValueError("micro_batch does nothing without model: a function gets all responses at once")
        return self

    @property
    def model_name(self) -> str:
        """The name of a reward model in metrics."""
        return self.name or str(self.model).rstrip("/").rpartition("/")[2]


class RewardsConfig(Section):
    """The rewards and what happens when a function fails."""

    functions: Annotated[list[RewardConfig], Field(min_length=1)]
    time_limit: Rate | None = 60.0
    """Seconds for one call of a function; null: no limit. Reward models have none."""
    on_error: Literal["stop", "drop"] = "stop"
    """stop: save and stop. drop: score one by one and count the culprits as unscorable."""
    max_consecutive_drops: Positive = 8
    """With `drop`: this many calls of the rewards in a row with a culprit stop the run, and so do this many responses
    in a row on which a function hangs."""

    def idle(self) -> Mapping[str, str]:
        """Nothing is dropped by a run that stops, and models have no time limit."""
        stops = {"max_consecutive_drops": "with on_error: stop"} if self.on_error == "stop" else {}
        models = all(each.model is not None for each in self.functions)
        return stops | ({"time_limit": "where every reward is a model"} if models else {})


class RolloutConfig(Section):
    """What the policy is asked to write in a step."""

    prompts_per_step: Positive = 16
    """Prompts B."""
    responses_per_prompt: Positive = 8
    """Responses a prompt, G."""
    prompts_at_once: Positive | None = None
    """Prompts whose responses are written together, their keys and values in memory; all of a step when left out. It
    changes no response."""
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
    """Times that prompts are replaced by fresh ones (DAPO) whose responses got equal rewards, penalties taken off, or
    of which none is learnt from."""

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
