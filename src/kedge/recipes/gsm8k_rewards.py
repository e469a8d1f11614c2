"""Rewards for GSM8K: a worked solution that ends with ``#### number``, and the right number."""

from __future__ import annotations

import re
from typing import Any

_NUMBER = r"-?\$?\d[\d,]*(?:\.\d+)?"
_ANSWER = re.compile(rf"(?:^|\n)#### ({_NUMBER})\s*\Z")


def final_number(completion: str) -> str | None:
    r"""Give the number that a well-formed completion ends with, without commas; None if it is not well-formed.

    >>> final_number("16 - 3 - 4 = 9\n9 * 2 = 18\n#### 1,018"), final_number("#### 18 eggs")
    ('1018', None)
    """
    match = _ANSWER.search(completion)
    if match is None or completion.count("####") != 1:
        return None
    return match[1].replace(",", "").replace("$", "")


def well_formed(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    r"""Reward 1 for a completion whose last line, and no other, is ``#### number``.

    >>> well_formed([""] * 2, ["9 * 2 = 18\n#### 18", "9 * 2 = 18"])
    [1.0, 0.0]
    """
    return [float(final_number(completion) is not None) for completion in completions]


def correct(prompts: list[str], completions: list[str], answer: list[str], **columns: Any) -> list[float]:
    r"""Reward 1 for the number that the data's worked solution ends with.

    >>> correct([""] * 2, ["so 18\n#### 18", "so 19\n#### 19"], answer=["9 * 2 = 18\n#### 18"] * 2)
    [1.0, 0.0]
    """
    truths = [final_number(text) for text in answer]
    found = [final_number(completion) for completion in completions]
    return [float(mine is not None and mine == truth) for mine, truth in zip(found, truths, strict=True)]
