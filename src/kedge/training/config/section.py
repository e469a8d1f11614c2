"""What every part of a recipe is made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    model_serializer,
    model_validator,
)

Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(gt=0)]
Unit = Literal["nats/token", "nats/response"]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


class Section(BaseModel):
    """A part of a recipe: unknown keys are errors, types are not guessed, values do not change later.

    A setting that does nothing beside the others (`idle`) is refused when given, and left out when written, so that
    a written recipe can be read again.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    def idle(self) -> Mapping[str, str]:
        """Say which settings do nothing beside the others, and beside which: "with kind: none".

        A setting of a section below goes by its path: "trust_region.low".
        """
        return {}

    @model_validator(mode="after")
    def _nothing_idle(self) -> Section:
        for name, beside in self.idle().items():
            if _given(self, name.split(".")):
                raise ValueError(f"{name} does nothing {beside}")
        return self

    @model_serializer(mode="wrap")
    def _without_idle(self, write: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        written = write(self)
        for name in self.idle():
            *sections, key = name.split(".")
            place = written
            for section in sections:
                place = place.get(section, {})
            place.pop(key, None)
        return written


def _given(section: BaseModel, path: list[str]) -> bool:
    first, *rest = path
    return first in section.model_fields_set and (not rest or _given(getattr(section, first), rest))
