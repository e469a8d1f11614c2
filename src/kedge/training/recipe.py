"""Reading a recipe: YAML with overrides to the typed tree, errors with file, line and suggestion."""

from __future__ import annotations

import difflib
import re
import types
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from kedge.errors import UserError
from kedge.training.config import Recipe

Location = tuple[str | int, ...]


class _Loader(yaml.SafeLoader):
    """Safe YAML that reads 1e-5 as a number, as YAML 1.2 does."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*)(\.[\d_]*)?([eE][-+]?\d+)$|^[-+]?(\d[\d_]*)?\.\d[\d_]*([eE][-+]?\d+)?$"),
    list("-+0123456789."),
)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read, override and validate a recipe file.

    ``overrides`` are ``key=value`` strings; keys are dotted paths, stages are addressed by name or position
    (``stages.anchored.steps=10``), values are YAML. Raises ``UserError`` naming file, line, key and remedy.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such recipe; `kedge recipes` lists the ones that ship with Kedge"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a recipe: {error}") from None
    return parse_recipe(text, source=str(path), overrides=overrides)


def parse_recipe(text: str, *, source: str = "recipe", overrides: Sequence[str] = ()) -> Recipe:
    """Validate recipe text; see ``load_recipe``."""
    lines: dict[Location, int] = {}
    try:
        node = yaml.compose(text, Loader=_Loader)
        tree = yaml.load(text, Loader=_Loader)
        if node is not None:
            _record_lines(node, (), lines, source)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{source}:{mark.line + 1}" if mark is not None else source
        raise UserError(f"{where}: not valid YAML: {getattr(error, 'problem', None) or error}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{source}: a recipe is a mapping of keys to values, this file holds {_kind(tree)}")
    tree = _unshared(tree)
    overridden = {_override(tree, item) for item in overrides}
    return validate_recipe(tree, source=source, lines=lines, overridden=overridden)


def validate_recipe(
    tree: Mapping[str, Any],
    *,
    source: str = "configuration",
    lines: Mapping[Location, int] | None = None,
    overridden: Iterable[Location] = (),
) -> Recipe:
    """Turn plain data into a ``Recipe``; every problem in it is named in one ``UserError``."""
    try:
        return Recipe.model_validate(dict(tree))
    except ValidationError as error:
        problems = [_problem(item, tree, source, lines or {}, set(overridden)) for item in error.errors()]
        raise UserError("\n".join(dict.fromkeys(problems))) from None


def _record_lines(node: yaml.Node, location: Location, lines: dict[Location, int], source: str) -> None:
    lines[location] = node.start_mark.line + 1
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if key.value in seen:
                raise UserError(f"{source}:{key.start_mark.line + 1}: the key {key.value!r} is given twice")
            seen.add(key.value)
            _record_lines(value, (*location, key.value), lines, source)
            lines[(*location, key.value)] = key.start_mark.line + 1
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            _record_lines(value, (*location, index), lines, source)


def _unshared(value: Any) -> Any:
    """Copy a tree so that what YAML's anchors and merges share belongs to each place alone.

    >>> shared = {"steps": 1}
    >>> apart = _unshared({"one": shared, "two": shared})
    >>> apart["one"]["steps"] = 2
    >>> apart
    {'one': {'steps': 2}, 'two': {'steps': 1}}
    """
    if isinstance(value, dict):
        return {key: _unshared(each) for key, each in value.items()}
    return [_unshared(each) for each in value] if isinstance(value, list) else value


def _override(tree: dict[str, Any], item: str) -> Location:
    """Apply one ``key=value`` in place and give the location that it set."""
    key, sign, text = item.partition("=")
    if not sign or not key:
        raise UserError(f"override {item!r}: write key=value, for example seed=1 or stages.sft.steps=100")
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError:
        raise UserError(f"override {item!r}: {text!r} is not a YAML value") from None
    place: Any = tree
    location: Location = ()
    *parents, last = key.split(".")
    for part in parents:
        step = _step(place, part, item)
        if isinstance(place, dict):
            place.setdefault(step, {})
        place = place[step]
        location = (*location, step)
    step = _step(place, last, item)
    place[step] = value
    return (*location, step)


def _step(place: Any, part: str, item: str) -> str | int:
    if isinstance(place, dict):
        return part
    if isinstance(place, list):
        names = [entry.get("name") if isinstance(entry, dict) else None for entry in place]
        if part in names:
            return names.index(part)
        if part.isdigit() and int(part) < len(place):
            return int(part)
        known = ", ".join(str(name) for name in names if name is not None)
        raise UserError(f"override {item!r}: {part!r} is neither a name nor a position in the list ({known})")
    raise UserError(f"override {item!r}: there is nothing below {part!r}")


def _problem(
    item: Any, tree: Mapping[str, Any], source: str, lines: Mapping[Location, int], overridden: set[Location]
) -> str:
    location = _real_location(item["loc"], tree, names_key=item["type"] in ("missing", "extra_forbidden"))
    key = ".".join(map(str, location)) or "the recipe"
    known = location
    while known and known not in lines:
        known = known[:-1]
    if any(location[: len(place)] == place or place[: len(location)] == location for place in overridden):
        where = "command line" if item["type"] != "missing" else source
    else:
        where = f"{source}:{lines[known]}" if known in lines else source
    return f"{where}: {key}: {_reason(item, location, tree)}"


def _real_location(loc: Location, tree: Mapping[str, Any], *, names_key: bool) -> Location:
    """Drop the tags of unions, which pydantic puts between the keys, and behind them unless a key is at fault."""
    location: list[str | int] = []
    place: Any = tree
    for position, part in enumerate(loc):
        last = position == len(loc) - 1
        if isinstance(place, Mapping) and (part in place or (last and names_key)):
            location.append(part)
            place = place.get(part)
        elif isinstance(place, list) and isinstance(part, int) and part < len(place):
            location.append(part)
            place = place[part]
    return tuple(location)


def _reason(item: Any, location: Location, tree: Mapping[str, Any]) -> str:
    kind = item["type"]
    if kind == "extra_forbidden":
        return f"unknown key{_suggestion(str(location[-1]), _keys_at(location[:-1], tree))}"
    if kind == "missing":
        return "is required and was not given"
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        context = item["ctx"]
        field = context["discriminator"].strip("'")
        if kind == "union_tag_not_found":
            return f"needs `{field}`"
        return f"{field}: {context['tag']!r} is none of {context['expected_tags']}"
    message = str(item["msg"]).removeprefix("Value error, ")
    if kind == "value_error":
        return message
    return f"{message[0].lower()}{message[1:]}, not {_shown(item['input'])}"


def _suggestion(word: str, keys: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, keys, n=1)
    if near:
        return f"; did you mean `{near[0]}`?"
    return f"; known here: {', '.join(keys)}" if keys else ""


def _keys_at(location: Location, tree: Mapping[str, Any]) -> list[str]:
    """Find the keys that the typed tree knows at a location."""
    annotation: Any = Recipe
    model: type[BaseModel] = Recipe
    place: Any = tree
    for part in location:
        place = place[part]
        if isinstance(part, str):
            annotation = model.model_fields[part].annotation
        if isinstance(place, Mapping):
            fitting = [candidate for candidate in _models(annotation) if _matches_tag(candidate, place)]
            if not fitting:
                return []
            model = fitting[0]
    return [str(name) for name in model.model_fields]


def _models(annotation: Any) -> list[type[BaseModel]]:
    """Find the model classes inside an annotation."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (Union, types.UnionType, list) or hasattr(annotation, "__metadata__"):
        return [model for argument in get_args(annotation) for model in _models(argument)]
    return []


def _matches_tag(model: type[BaseModel], place: Any) -> bool:
    """Tell whether a discriminated union would choose this class for the data at hand."""
    for tag in ("method", "kind"):
        field = model.model_fields.get(tag)
        if field is not None and field.is_required() and isinstance(place, Mapping):
            return place.get(tag) in get_args(field.annotation)
    return True


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"
