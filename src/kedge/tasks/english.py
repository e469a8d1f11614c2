"""The rules of the prose grammar, for one topic."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from typing import TypeVar

from kedge.tasks import lexicon
from kedge.tasks.grammar import Grammar

POLARITY_SHARES = {"positive": 0.35, "negative": 0.35, "neutral": 0.30}
TOPIC_SHARE, GENERAL_SHARE = 0.75, 0.2  # of the agents; the rest belong to other topics

Alternatives = list[tuple[float, tuple[str, ...]]]
T = TypeVar("T")
_NUMBERS = ("sg", "pl")


@cache
def grammar(topic: str) -> Grammar:
    """Return the grammar of texts of one or two sentences about a topic.

    Topics differ in the probabilities of the nouns alone: what is grammatical under one topic is
    grammatical under all. Number agrees between determiner, noun and verb, across relative clauses
    (``the birds who the child sees sing``) and joined subjects (``the cook and the guest smile``).

    >>> from kedge.tasks.english import grammar
    >>> grammar("sea").log_prob("the happy sailor sings .".split()) > -20
    True
    >>> grammar("sea").log_prob("the happy sailor sing .".split())
    -inf
    """
    rules = _sentences() | _noun_phrases() | _verb_phrases() | _words(topic)
    return Grammar(rules, start="text")


def _sentences() -> dict[str, Alternatives]:
    """One clause, or two: joined by a conjunction, or as sentences of their own."""
    return {
        "text": [(0.88, ("clause", "ending")), (0.12, ("opener", "clause", ",", "clause", "."))],
        "ending": [(0.75, (".", "more")), (0.25, ("link", "clause", "."))],
        "more": [(0.6, ()), (0.4, ("clause", "."))],
        "clause": _determined("subject"),
        "opener": _uniform(lexicon.OPENERS),
        "link": _uniform(lexicon.LINKS),
    }


def _noun_phrases() -> dict[str, Alternatives]:
    """Noun phrases by role; what may follow a subject depends on its noun."""
    rules: dict[str, Alternatives] = {
        "simple": _determined("simple"),
        "person": _determined("person"),
        "gap": _determined("gap"),
        "modifiers": [(0.45, ()), (0.43, ("adjective", "modifier")), (0.12, ("degree", "adjective"))],
        "modifier": [(0.75, ()), (0.25, ("adjective",))],
    }
    for role in ("subject", "simple", "person", "gap"):
        rules[f"{role}.any"] = [(1.0, ("modifiers", f"{role}.noun.any"))]
        rules[f"{role}.noun.any"] = [(0.55, (f"{role}.noun.sg",)), (0.45, (f"{role}.noun.pl",))]
        for number in _NUMBERS:
            rules[f"{role}.{number}"] = [(1.0, ("modifiers", f"{role}.noun.{number}"))]
    for n in _NUMBERS:
        agent, thing = f"agent.{n}", f"thing.{n}"
        rules |= {
            f"subject.noun.{n}": [(0.7, (agent, f"after.{agent}")), (0.3, (thing, f"after.{thing}"))],
            f"after.{agent}": [
                (0.77, (f"phrase.{agent}",)),
                (0.15, (f"relative.{agent}", f"phrase.{agent}")),
                (0.08, ("and", "person", "phrase.agent.pl")),
            ],
            f"after.{thing}": [
                (0.85, (f"phrase.{thing}",)),
                (0.15, (f"relative.{thing}", f"phrase.{thing}")),
            ],
            f"simple.noun.{n}": [(0.5, (agent,)), (0.5, (thing,))],
            f"person.noun.{n}": [(1.0, (agent,))],
            f"gap.noun.{n}": [(1.0, (agent, f"transitive.{n}"))],
            f"relative.{agent}": [(1.0, ("who", f"who.{n}"))],
            f"relative.{thing}": [(1.0, ("which", f"which.{n}"))],
            f"who.{n}": [
                (0.3, (f"intransitive.{n}",)),
                (0.2, (f"transitive.{n}", "simple")),
                (0.2, (f"copula.{n}", "quality")),
                (0.3, ("gap",)),
            ],
            f"which.{n}": [
                (0.3, (f"thing_verb.{n}",)),
                (0.3, (f"copula.{n}", "quality")),
                (0.4, ("gap",)),
            ],
        }
    return rules


def _verb_phrases() -> dict[str, Alternatives]:
    rules: dict[str, Alternatives] = {
        "quality": [(0.7, ("adjective",)), (0.3, ("degree", "adjective"))],
        "qualities": [(1.0, ("quality", "another"))],
        "another": [(0.8, ()), (0.2, ("and", "adjective"))],
        "manner": [(0.5, ()), (0.5, ("adverb",))],
        "whereabouts": [(0.75, ()), (0.25, ("preposition", "the", "place"))],
    }
    for n in _NUMBERS:
        rules |= {
            f"phrase.agent.{n}": [
                (0.4, (f"intransitive.{n}", "manner", "whereabouts")),
                (0.4, (f"transitive.{n}", "simple", "manner")),
                (0.2, (f"copula.{n}", "qualities")),
            ],
            f"phrase.thing.{n}": [
                (0.5, (f"thing_verb.{n}", "manner", "whereabouts")),
                (0.5, (f"copula.{n}", "qualities")),
            ],
        }
    return rules


def _words(topic: str) -> dict[str, Alternatives]:
    own = lexicon.TOPICS[topic]
    others = [nouns for name, nouns in lexicon.TOPICS.items() if name != topic]
    rules: dict[str, Alternatives] = {
        "determiner.sg": _uniform(lexicon.SINGULAR_DETERMINERS),
        "determiner.pl": _uniform(lexicon.PLURAL_DETERMINERS),
        "degree": _uniform(lexicon.DEGREES),
        "preposition": _uniform(lexicon.PREPOSITIONS),
        "adjective": _polar(lexicon.ADJECTIVES),
        "adverb": _polar(lexicon.ADVERBS),
        "place": _mixture((0.95, own.places), (0.05, _joined(nouns.places for nouns in others))),
    }
    away = 1.0 - TOPIC_SHARE - GENERAL_SHARE
    for i, n in enumerate(_NUMBERS):
        agents = [nouns[i] for nouns in own.agents]
        other_agents = [pair[i] for nouns in others for pair in nouns.agents]
        general = [pair[i] for pair in lexicon.GENERAL_AGENTS]
        things = [pair[i] for pair in own.things]
        other_things = [pair[i] for nouns in others for pair in nouns.things]
        rules |= {
            f"agent.{n}": _mixture((TOPIC_SHARE, agents), (GENERAL_SHARE, general), (away, other_agents)),
            f"thing.{n}": _mixture((1.0 - away, things), (away, other_things)),
            f"copula.{n}": _uniform([pair[i] for pair in lexicon.COPULAS]),
        }
        for symbol, verbs in (
            ("intransitive", lexicon.INTRANSITIVES),
            ("transitive", lexicon.TRANSITIVES),
            ("thing_verb", lexicon.THING_VERBS),
        ):
            rules[f"{symbol}.{n}"] = _polar({p: [pair[i] for pair in verbs[p]] for p in lexicon.POLARITIES})
    return rules


def _determined(role: str) -> Alternatives:
    """Begin with ``the``, which leaves the number to the noun, or a determiner that fixes it."""
    return [
        (0.5, ("the", f"{role}.any")),
        (0.27, ("determiner.sg", f"{role}.sg")),
        (0.23, ("determiner.pl", f"{role}.pl")),
    ]


def _uniform(words: Sequence[str]) -> Alternatives:
    return [(1.0 / len(words), (word,)) for word in words]


def _mixture(*parts: tuple[float, Sequence[str]]) -> Alternatives:
    return [(share / len(words), (word,)) for share, words in parts for word in words]


def _polar(words: dict[lexicon.Polarity, list[str]]) -> Alternatives:
    return _mixture(*((POLARITY_SHARES[polarity], words[polarity]) for polarity in lexicon.POLARITIES))


def _joined(lists: Iterable[Sequence[T]]) -> list[T]:
    return [item for each in lists for item in each]
