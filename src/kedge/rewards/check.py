"""Checking what a reward function takes and returns."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable
from typing import Any

from kedge.errors import UserError
from kedge.rewards.failure import RewardError

RESERVED = ("prompts", "completions")
ON_REQUEST = ("prompt_ids", "completion_ids", "completion_finished")
"""Token ids of prompts and responses, as TRL calls them, and whether a response ended by itself."""
_SHOWN = 80
_LARGEST = 3.4028234663852886e38
"""The largest float32: rewards are kept in the policy's precision."""


def accepted_columns(name: str, function: Callable[..., Any], columns: Iterable[str]) -> list[str]:
    """Choose the columns that a function is called with: all if it takes ``**kwargs``, else those it names.

    What is there `ON_REQUEST` goes only to functions that name it.

    Raises:
        UserError: it needs a column that the data do not have, or does not take prompts and completions.
    """
    known = [key for key in columns if key not in ON_REQUEST]
    ours = [key for key in columns if key in ON_REQUEST]
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # builtins may have none
        return known
    by_name = {
        key: parameter
        for key, parameter in parameters.items()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    }
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    for key in RESERVED:
        if key not in by_name and not open_ended:
            raise UserError(
                f"reward {name!r} takes no argument {key!r}; write it as def reward(prompts, completions, "
                "**columns) and return a list of numbers"
            )
    missing = [
        key
        for key, parameter in by_name.items()
        if parameter.default is parameter.empty and key not in [*known, *ours, *RESERVED]
    ]
    if missing:
        raise UserError(
            f"reward {name!r} needs the column {missing[0]!r}, which the data do not have; "
            f"their columns: {', '.join(known) or 'none'}"
        )
    named = [key for key in [*known, *ours] if key in by_name]
    return list(dict.fromkeys([*known, *named])) if open_ended else named


def checked_values(name: str, returned: Any, prompts: list[Any], completions: list[Any]) -> list[float]:
    """Turn what a reward function returned into numbers, NaN for None.

    Raises:
        RewardError: not a list, another count, or a value that is no finite number; it names the sample.
    """
    values = returned.tolist() if hasattr(returned, "tolist") else returned
    if not isinstance(values, (list, tuple)):
        raise RewardError(
            f"reward {name!r} returned {_a(returned)} instead of a list of {len(completions)} numbers, "
            "one a completion",
            name,
        )
    if len(values) != len(completions):
        raise RewardError(
            f"reward {name!r} returned {len(values)} values for {len(completions)} completions; "
            "return one a completion, None for what cannot be scored",
            name,
        )
    return [
        _number(name, value, index, prompts[index], completions[index]) for index, value in enumerate(values)
    ]


def _number(name: str, value: Any, index: int, prompt: Any, completion: Any) -> float:
    if value is None:
        return math.nan
    plain = value.item() if hasattr(value, "item") and getattr(value, "size", None) != 0 else value
    what = None
    if not isinstance(plain, (bool, int, float)):
        what = _a(value)
    elif not abs(plain) <= _LARGEST:
        what = str(plain)
    if what is None:
        return float(plain)
    raise RewardError(
        f"reward {name!r} returned {what} for sample {index} (prompt {_shown(prompt)}, completion "
        f"{_shown(completion)}); return a number within float32's range, or None for what cannot be scored",
        name,
        sample=index,
    )


def _a(value: Any) -> str:
    if isinstance(value, str):
        return f"the string {_shown(value)}"
    return "None" if value is None else f"a {type(value).__name__}"


def _shown(text: Any) -> str:
    written = repr(text)
    return written if len(written) <= _SHOWN else f"{written[: _SHOWN // 2]} … {written[-_SHOWN // 2 :]}"
