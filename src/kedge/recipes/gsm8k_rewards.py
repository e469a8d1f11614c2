"""Rewards for GSM8K: a worked solution that ends with ``#### number``, and the right number.

A base model that has answered often goes on with a question of its own, where the recipe ``gsm8k-qwen`` stops it. What
comes from there on is no part of the solution.
"""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Any

_NEXT = "\nQuestion:"

_NUMBER = r"-?\$?\d[\d,]*(?:\.\d+)?"
_ANSWER = re.compile(rf"(?:^|\n)#### ({_NUMBER})\s*\Z")


def final_number(completion: str) -> str | None:
    r"""Give the number that a well-formed completion ends with, without commas; None if it is not well-formed.

    >>> final_number("16 - 3 - 4 = 9\n9 * 2 = 18\n#### 1,018"), final_number("#### 18 eggs")
    ('1018', None)
    >>> final_number("9 * 2 = 18\n#### 18\nQuestion:")
    '18'
    """
    solution = completion.partition(_NEXT)[0]
    match = _ANSWER.search(solution)
    if match is None or solution.count("####") != 1:
        return None
    return match[1].replace(",", "").replace("$", "")


def _equal(one: str | None, other: str | None) -> bool:
    return one is not None and other is not None and Decimal(one) == Decimal(other)


def well_formed(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    r"""Reward 1 for a completion whose last line, and no other, is ``#### number``.

    >>> well_formed([""] * 2, ["9 * 2 = 18\n#### 18", "9 * 2 = 18"])
    [1.0, 0.0]
    """
    return [float(final_number(completion) is not None) for completion in completions]


def correct(prompts: list[str], completions: list[str], answer: list[str], **columns: Any) -> list[float]:
    r"""Reward 1 for the number that the data's worked solution ends with, however many decimals it is written with.

    >>> correct([""] * 2, ["so 18\n#### $18.00", "so 19\n#### 19"], answer=["9 * 2 = 18\n#### 18"] * 2)
    [1.0, 0.0]
    """
    pairs = zip(map(final_number, completions), map(final_number, answer), strict=True)
    return [float(_equal(mine, truth)) for mine, truth in pairs]
