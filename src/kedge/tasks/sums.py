"""Sums: additions whose answer can be verified.

A problem is ``47+38=``. The data know two ways to answer it:

* *careful*: column by column from the right, with the carry, then the answer after ``#``:
  ``7+8=15 4+3+1=8 #85`` (always right);
* *hasty*: an estimate, the sum of the terms rounded to tens: ``#90`` (right in one problem of ten).

Most of the data is hasty (`CAREFUL_SHARE`), so a model fine-tuned on them is mostly wrong, sampled or
greedy; but the careful way is in it. A reward for the right answer alone is enough to bring it out:
reinforcement learning with a verifiable reward, in miniature.

Held-out problems never occur in training: a hash of the unordered pair of terms decides the split.
"""

from __future__ import annotations

import random
import zlib
from typing import TYPE_CHECKING, Any

from kedge.errors import UserError
from kedge.tasks.vocabulary import fixed_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SPLITS = ("train", "heldout")

SYMBOLS = "0123456789+= #"
CONTEXT = 48
CAREFUL_SHARE = 0.3
HELDOUT_SHARE = 0.1
LOWEST, HIGHEST = 10, 99


def tokenizer() -> PreTrainedTokenizerFast:
    """Return the tokenizer of the task: one token a character, pad and eos; 16 in all.

    >>> from kedge.tasks import sums
    >>> len(sums.tokenizer())
    16
    """
    return fixed_tokenizer(list(SYMBOLS), unit="character", context=CONTEXT)


def split_of(first: int, second: int) -> str:
    """Return the split that the problem ``first+second=`` belongs to, whichever term comes first.

    >>> from kedge.tasks import sums
    >>> sums.split_of(47, 38) == sums.split_of(38, 47)
    True
    """
    low, high = sorted((first, second))
    bucket = zlib.crc32(f"{low}+{high}".encode()) / 2**32
    return "heldout" if bucket < HELDOUT_SHARE else "train"


def careful(first: int, second: int) -> str:
    """Work the sum out column by column.

    >>> from kedge.tasks import sums
    >>> sums.careful(47, 38)
    '7+8=15 4+3+1=8 #85'
    """
    steps, carry = [], 0
    for a, b in zip(reversed(str(first)), reversed(str(second)), strict=True):
        column = int(a) + int(b) + carry
        steps.append(f"{a}+{b}+1={column}" if carry else f"{a}+{b}={column}")
        carry = column // 10
    return f"{' '.join(steps)} #{first + second}"


def hasty(first: int, second: int) -> str:
    """Estimate the sum: round both terms to tens (5 upwards), then add.

    >>> from kedge.tasks import sums
    >>> sums.hasty(47, 38), sums.hasty(41, 45)
    ('#90', '#90')
    """
    return f"#{(first + 5) // 10 * 10 + (second + 5) // 10 * 10}"


def prompts(split: str, count: int, seed: int) -> list[dict[str, Any]]:
    """Draw problems of a split, uniformly, with replacement.

    Args:
        split: "train" or "heldout"; no problem is in both.
        count: number of rows.
        seed: equal seeds give equal rows.

    Returns:
        Rows ``{"prompt": "47+38=", "answer": "85"}``.

    >>> from kedge.tasks import sums
    >>> row, = sums.prompts("heldout", 1, seed=0)
    >>> sorted(row)
    ['answer', 'prompt']
    """
    return [
        {"prompt": f"{first}+{second}=", "answer": str(first + second)}
        for first, second in _problems(split, count, random.Random(f"sums/prompts/{split}/{seed}"))
    ]


def examples(split: str, count: int, seed: int) -> list[dict[str, Any]]:
    """Draw problems with a worked answer each, a share `CAREFUL_SHARE` of them careful, the rest hasty.

    Args:
        split: "train" or "heldout"; no problem is in both.
        count: number of rows.
        seed: equal seeds give equal rows.

    Returns:
        Rows ``{"prompt", "completion", "answer"}``; ``answer`` is the right one, also where the
        completion is hasty and wrong.

    >>> from kedge.tasks import sums
    >>> row, = sums.examples("train", 1, seed=0)
    >>> sorted(row)
    ['answer', 'completion', 'prompt']
    """
    generator = random.Random(f"sums/examples/{split}/{seed}")
    rows = []
    for first, second in _problems(split, count, generator):
        way = careful if generator.random() < CAREFUL_SHARE else hasty
        prompt, completion = f"{first}+{second}=", way(first, second)
        rows.append({"prompt": prompt, "completion": completion, "answer": str(first + second)})
    return rows


def correct(prompts: list[str], completions: list[str], answer: list[str], **_: Any) -> list[float]:
    """Reward 1.0 where what follows the last ``#`` is exactly the answer, else 0.0.

    >>> from kedge.tasks import sums
    >>> sums.correct(["47+38="] * 3, ["#90", "#85", "85"], answer=["85"] * 3)
    [0.0, 1.0, 0.0]
    """
    return [
        float("#" in completion and completion.rpartition("#")[2] == right)
        for completion, right in zip(completions, answer, strict=True)
    ]


def _problems(split: str, count: int, generator: random.Random) -> list[tuple[int, int]]:
    if split not in SPLITS:
        raise UserError(f"the sums task has no split {split!r}; there are {' and '.join(SPLITS)}")
    found: list[tuple[int, int]] = []
    while len(found) < count:
        first, second = generator.randint(LOWEST, HIGHEST), generator.randint(LOWEST, HIGHEST)
        if split_of(first, second) == split:
            found.append((first, second))
    return found
