"""A whole recipe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from kedge.training.config.inputs import ModelConfig
from kedge.training.config.reward_model import RewardStage
from kedge.training.config.section import Name, NonNegative, Section
from kedge.training.config.stages import GrpoStage, PpoStage, SftStage

Stage = Annotated[SftStage | RewardStage | GrpoStage | PpoStage, Field(discriminator="method")]
"""What a recipe chains: a section for each method."""


class Recipe(Section):
    """A whole run: a model and the stages that train it, one after the other."""

    name: Name
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
        seen: dict[str, Stage] = {}
        for stage in self.stages:
            if stage.name in seen:
                raise ValueError(f"two stages are called {stage.name!r}")
            if stage.start is not None:
                self._require_policy(stage, seen.get(stage.start), list(seen))
            self._require_reward_models(stage, seen)
            seen[stage.name] = stage
        return self

    def _require_policy(self, stage: Stage, start: Stage | None, seen: list[str]) -> None:
        if start is None:
            raise ValueError(
                f"stage {stage.name!r} starts from {stage.start!r}, which is no earlier stage"
                + (f" (there are: {', '.join(seen)})" if seen else "")
            )
        if isinstance(start, RewardStage):
            raise ValueError(  # noqa: TRY004 (pydantic turns it into a located error)
                f"stage {stage.name!r} starts from {stage.start!r}, which trains a reward model; start from a stage "
                "that trains the policy, and name the reward model in rewards.functions"
            )

    def _require_reward_models(self, stage: Stage, seen: Mapping[str, Stage]) -> None:
        """Refuse a stage's name as a reward model where that stage trains none, or has not run yet."""
        if isinstance(stage, SftStage | RewardStage):
            return
        functions = stage.rewards.functions if stage.rewards is not None else []
        named = [("rewards.functions", entry.model) for entry in functions]
        if isinstance(stage, PpoStage):
            named.append(("critic.model", stage.critic.model))
        for key, model in named:
            if model in {each.name for each in self.stages} and not isinstance(seen.get(model), RewardStage):
                raise ValueError(
                    f"stage {stage.name!r}: {key}: {model!r} is no earlier stage of method: reward"
                )

    def policy_before(self, stage: Stage) -> str | None:
        """Name the stage whose final policy a stage starts from; None: the recipe's model as it is."""
        if stage.start is not None:
            return stage.start
        before = self.stages[: self.stages.index(stage)]
        return next((each.name for each in reversed(before) if not isinstance(each, RewardStage)), None)

    @property
    def directory(self) -> str:
        """Where the run is written."""
        return self.out if self.out is not None else f"runs/{self.name}"

    def dump(self) -> dict[str, Any]:
        """Give the resolved recipe as plain data, without `resume`, which is no property of a run."""
        return self.model_dump(mode="json", exclude={"resume"})
