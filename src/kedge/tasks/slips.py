"""Texts of the prose task, some of them broken by slips of the pen."""

from __future__ import annotations

import random
from functools import cache

from kedge.tasks import lexicon

SLIP_SHARE = 0.3
"""Of the texts that have a slip."""
MORE_SLIPS = 0.8
"""Of the texts with a slip that have another one, and so on: five in the mean. Who slips, slips badly."""


def slip(words: list[str], generator: random.Random) -> list[str]:
    """Make one mistake: a word in the wrong number, left out, said twice, swapped with the next, or another word.

    The text may stay grammatical: leaving out an adjective is no mistake.

    >>> slip("the sailor sings .".split(), random.Random(0)) != "the sailor sings .".split()
    True
    """
    kind = generator.choice(("number", "number", "omission", "repetition", "swap", "word", "end"))
    numbered = [index for index, word in enumerate(words) if word in _other_number()]
    if kind == "number" and numbered:
        place = generator.choice(numbered)
        return [*words[:place], _other_number()[words[place]], *words[place + 1 :]]
    place = generator.randrange(len(words))
    if kind == "end" and place > 0:
        return words[:place]
    if kind == "repetition":
        return [*words[: place + 1], *words[place:]]
    if kind == "swap" and place + 1 < len(words):
        return [*words[:place], words[place + 1], words[place], *words[place + 2 :]]
    if kind == "omission" and len(words) > 1:
        return words[:place] + words[place + 1 :]
    return [*words[:place], generator.choice(_vocabulary()), *words[place + 1 :]]


def slips(words: list[str], generator: random.Random) -> list[str]:
    """Make no mistake or several; `SLIP_SHARE` of the texts have one at least.

    >>> slips("the sailor sings .".split(), random.Random(5))
    ['the', 'sailor', 'sings', '.']
    """
    more = SLIP_SHARE
    while generator.random() < more:
        words, more = slip(words, generator), MORE_SLIPS
    return words


@cache
def _other_number() -> dict[str, str]:
    """Pair every noun and verb with its other number."""
    pairs = [*lexicon.COPULAS, *lexicon.GENERAL_AGENTS]
    for topic in lexicon.TOPICS.values():
        pairs += topic.agents + topic.things
    for verbs in (lexicon.INTRANSITIVES, lexicon.TRANSITIVES, lexicon.THING_VERBS):
        pairs += [pair for polarity in lexicon.POLARITIES for pair in verbs[polarity]]
    return {a: b for first, second in pairs for a, b in ((first, second), (second, first))}


@cache
def _vocabulary() -> list[str]:
    """List the words that may stand in a text: all but those of prompts."""
    return [word for word in lexicon.vocabulary() if word not in (*lexicon.PROMPT_WORDS, *lexicon.TOPICS)]
