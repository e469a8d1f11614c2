"""Every key of a recipe with its meaning, type and default, from the typed tree itself."""

from __future__ import annotations

import re
import types
from collections.abc import Iterator
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from kedge.training.config import Recipe


def manual() -> str:
    """Give the reference of recipes as Markdown; ``docs/recipe.md`` is this text."""
    lines = [
        "# Every key of a recipe",
        "",
        "Made from the typed tree by `kedge recipes keys`. Unknown keys are errors; what acts on nothing is refused.",
        "On the command line keys are dotted paths, stages go by name: `stages.grpo.rollout.temperature=0.8`.",
    ]
    done: set[type[BaseModel]] = set()
    queue: list[type[BaseModel]] = [Recipe]
    while queue:
        model = queue.pop(0)
        if model in done:
            continue
        done.add(model)
        lines += [
            "",
            f"## {title(model)}",
            "",
            _one_line(model.__doc__ or ""),
            "",
            "| key | type | default | meaning |",
        ]
        lines.append("|---|---|---|---|")
        for name, field in model.model_fields.items():
            lines.append(
                f"| `{name}` | {_type(field.annotation)} | {_default(field)} | {_one_line(_meaning(field))} |"
            )
            queue += _models(field.annotation)
    return "\n".join(lines) + "\n"


def title(model: type[BaseModel]) -> str:
    """Name a section as people speak of it.

    >>> title(Recipe)
    'Recipe'
    """
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", model.__name__.removesuffix("Config")).capitalize()


def _meaning(field: FieldInfo) -> str:
    if field.description:
        return field.description
    sections = list(_models(field.annotation))
    return (sections[0].__doc__ or "") if len(sections) == 1 else ""


def _default(field: FieldInfo) -> str:
    if field.default is PydanticUndefined:
        return "required" if field.default_factory is None else ""
    if isinstance(field.default, BaseModel):
        return "its defaults"
    return (
        "left out"
        if field.default is None
        else f"`{field.default!r}`".replace("'", "").replace("False", "false").replace("True", "true")
    )


def _type(annotation: Any) -> str:
    origin = get_origin(annotation)
    if hasattr(annotation, "__metadata__"):
        return _type(get_args(annotation)[0])
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in get_args(annotation))
    if origin in (Union, types.UnionType):
        return " or ".join(_type(part) for part in get_args(annotation) if part is not type(None))
    if origin is list:
        return f"list of {_type(get_args(annotation)[0])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        anchor = title(annotation).lower().replace(" ", "-")
        return f"[{title(annotation)}](#{anchor})"
    return {"str": "text", "int": "whole number", "float": "number", "bool": "true or false"}[
        annotation.__name__
    ]


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _models(part)


def _one_line(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
