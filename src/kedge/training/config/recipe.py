"""A whole recipe."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from kedge.training.config.inputs import ModelConfig
from kedge.training.config.section import Name, NonNegative, Section
from kedge.training.config.stages import GrpoStage, PpoStage, SftStage

Stage = Annotated[SftStage | GrpoStage | PpoStage, Field(discriminator="method")]
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
