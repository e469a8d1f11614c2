from __future__ import annotations

import itertools
import math
import random
from collections import Counter

import pytest

from kedge.tasks.grammar import Grammar, Rules

SMALL: Rules = {
    "text": [(0.3, ("det.sg", "mod", "cat", "rest.sg")), (0.7, ("det.pl", "mod", "cats", "rest.pl", "end"))],
    "det.sg": [(0.4, ("a",)), (0.6, ("this",))],
    "det.pl": [(1.0, ("these",))],
    "mod": [(0.5, ()), (0.5, ("big", "more"))],
    "more": [(0.8, ()), (0.2, ("grey",))],
    "rest.sg": [(0.9, ("sleeps",)), (0.1, ("who", "eats", "sleeps"))],
    "end": [(0.6, ()), (0.4, ("today",))],
    "rest.pl": [(0.9, ("sleep",)), (0.1, ("who", "eat", "sleep"))],
}


def expand(rules: Rules, symbols: tuple[str, ...]) -> dict[tuple[str, ...], float]:
    """Every text of the symbols with its probability, by brute force over derivations."""
    if not symbols:
        return {(): 1.0}
    head, tail = symbols[0], symbols[1:]
    found: Counter[tuple[str, ...]] = Counter()
    alternatives = rules.get(head)
    if alternatives is None:
        return {(head, *rest): p for rest, p in expand(rules, tail).items()}
    for probability, body in alternatives:
        for (first, p), (rest, q) in itertools.product(
            expand(rules, body).items(), expand(rules, tail).items()
        ):
            found[first + rest] += probability * p * q
    return dict(found)


TEXTS = expand(SMALL, ("text",))
GRAMMAR = Grammar(SMALL, "text")


def test_log_probs_are_those_of_enumeration_and_sum_to_one() -> None:
    for text, probability in TEXTS.items():
        assert GRAMMAR.log_prob(text) == pytest.approx(math.log(probability), abs=1e-12)
    assert sum(math.exp(GRAMMAR.log_prob(text)) for text in TEXTS) == pytest.approx(1.0, abs=1e-12)


def test_nothing_else_has_a_probability() -> None:
    words = sorted({word for text in TEXTS for word in text})
    generator = random.Random(0)
    others = {tuple(generator.choices(words, k=generator.randint(0, 6))) for _ in range(5000)} - TEXTS.keys()
    assert all(GRAMMAR.log_prob(text) == -math.inf for text in others)


def test_entropy_and_length_are_those_of_enumeration() -> None:
    assert GRAMMAR.entropy() == pytest.approx(-sum(p * math.log(p) for p in TEXTS.values()), abs=1e-12)
    assert GRAMMAR.expected_length() == pytest.approx(
        sum(p * len(text) for text, p in TEXTS.items()), abs=1e-12
    )


def test_the_sampler_draws_with_the_probabilities() -> None:
    generator = random.Random(1)
    count = 20_000
    drawn = Counter(tuple(GRAMMAR.sample(generator)) for _ in range(count))
    assert drawn.keys() <= TEXTS.keys()
    for text, p in TEXTS.items():
        assert drawn[text] / count == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / count) + 1e-9)


def test_viable_words_are_the_longest_prefix_of_any_text() -> None:
    prefixes = {text[:n] for text in TEXTS for n in range(len(text) + 1)}
    words = sorted({word for text in TEXTS for word in text})
    for candidate in itertools.product(words, repeat=4):
        longest = max(n for n in range(5) if candidate[:n] in prefixes)
        assert GRAMMAR.viable_words(candidate) == longest


@pytest.mark.parametrize(
    ("rules", "reason"),
    [
        ({"t": [(0.5, ("a",)), (0.4, ("b",))]}, "sum to 1"),
        ({"t": [(0.5, ("a",)), (0.5, ("a", "t"))]}, "contain itself"),
        ({"t": [(0.5, ("x", "b")), (0.5, ("a", "c"))], "x": [(1.0, ("a",))]}, "can begin with 'a'"),
        ({"t": [(1.0, ("x", "a"))], "x": [(0.5, ()), (0.5, ("a",))]}, "what follows it"),
        ({"t": [(0.5, ()), (0.5, ("x",))], "x": [(0.5, ()), (0.5, ("a",))]}, "empty in two ways"),
        ({"t": [(0.5, ()), (0.5, ())]}, "empty in two ways"),
    ],
)
def test_ambiguous_or_endless_rules_are_refused(rules: Rules, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Grammar(rules, "t")
