"""Probabilistic grammars in which the next word decides the rule."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from functools import cache

Rules = Mapping[str, Sequence[tuple[float, tuple[str, ...]]]]


class Grammar:
    """A probabilistic context-free grammar, finite and LL(1), hence unambiguous.

    ``rules[symbol]`` lists the alternatives of a symbol as (probability, symbols); what has no rules
    is a word. A text has at most one derivation, and one word of look-ahead finds it, so the
    probability of a text is the product of the probabilities along it, exactly:

        log P(text) = Σ over the rules used of log p(rule)

    Raises:
        ValueError: if probabilities do not sum to 1, a symbol can contain itself, or a word would
            leave a choice of rules (the grammar would be ambiguous).

    >>> from kedge.tasks.grammar import Grammar
    >>> grammar = Grammar({"text": [(0.5, ("cats", "end")), (0.5, ("dogs", "end"))],
    ...                    "end": [(0.75, ()), (0.25, ("sing",))]}, start="text")
    >>> [round(math.exp(grammar.log_prob(t.split())), 3) for t in ("cats", "dogs sing", "sing")]
    [0.375, 0.125, 0.0]
    """

    def __init__(self, rules: Rules, start: str) -> None:
        self.rules = rules
        self.start = start
        for symbol, alternatives in rules.items():
            if not math.isclose(sum(p for p, _ in alternatives), 1.0, abs_tol=1e-9):
                raise ValueError(f"the probabilities of {symbol!r} do not sum to 1")
        self._depth_first(start, set(), {})
        self._log = {s: [math.log(p) for p, _ in alternatives] for s, alternatives in rules.items()}
        self._cumulative = {s: _cumulative([p for p, _ in a]) for s, a in rules.items()}
        self._nullable: dict[str, int | None] = {}
        self._first: dict[str, dict[str, int]] = {}
        for symbol in rules:
            self._look_ahead(symbol)
        self._refuse_follow_conflicts()

    def sample(self, generator: random.Random) -> list[str]:
        """Draw a text: expand the start symbol, each rule with its probability."""
        words: list[str] = []
        stack = [self.start]
        while stack:
            symbol = stack.pop()
            if symbol not in self.rules:
                words.append(symbol)
                continue
            draw = generator.random()
            cumulative = self._cumulative[symbol]
            index = next((i for i, bound in enumerate(cumulative) if draw < bound), len(cumulative) - 1)
            stack.extend(reversed(self.rules[symbol][index][1]))
        return words

    def log_prob(self, words: Iterable[str]) -> float:
        """Return log P(text) in nats, its end included; −inf where the grammar has no such text."""
        return self._walk(list(words))[0]

    def viable_words(self, words: Sequence[str]) -> int:
        """Return how many words can stand, in this order, at the beginning of some text."""
        return self._walk(words)[1]

    def entropy(self) -> float:
        """Return the exact entropy of a text, in nats.

        H(A) = Σ over the rules r of A of p_r·(−log p_r + Σ over the symbols of r of H(symbol)),
        since a text and its derivation determine each other.
        """

        @cache
        def entropy(symbol: str) -> float:
            if symbol not in self.rules:
                return 0.0
            return math.fsum(
                p * (math.fsum(map(entropy, body)) - math.log(p)) for p, body in self.rules[symbol]
            )

        return entropy(self.start)

    def expected_length(self) -> float:
        """Return the exact mean number of words of a text."""

        @cache
        def length(symbol: str) -> float:
            if symbol not in self.rules:
                return 1.0
            return math.fsum(p * math.fsum(map(length, body)) for p, body in self.rules[symbol])

        return length(self.start)

    def _walk(self, words: Sequence[str]) -> tuple[float, int]:
        log_prob = 0.0
        stack = [self.start]
        for position, word in enumerate(words):
            while True:
                if not stack:
                    return -math.inf, position
                symbol = stack.pop()
                if symbol == word:
                    break
                index = self._first.get(symbol, {}).get(word, self._nullable.get(symbol))
                if index is None:
                    return -math.inf, position
                log_prob += self._log[symbol][index]
                stack.extend(reversed(self.rules[symbol][index][1]))
        for symbol in reversed(stack):
            index = self._nullable.get(symbol)
            if index is None:
                return -math.inf, len(words)
            log_prob += self._log[symbol][index]
        return log_prob, len(words)

    def _depth_first(self, symbol: str, above: set[str], done: dict[str, bool]) -> None:
        if symbol in above:
            raise ValueError(f"{symbol!r} can contain itself: texts would have no longest length")
        if symbol in done or symbol not in self.rules:
            return
        for _, body in self.rules[symbol]:
            for part in body:
                self._depth_first(part, above | {symbol}, done)
        done[symbol] = True

    def _look_ahead(self, symbol: str) -> tuple[dict[str, int], bool]:
        """Find which rule each first word selects, and the rule that is empty."""
        if symbol not in self.rules:
            return {symbol: 0}, False
        if symbol not in self._first:
            first: dict[str, int] = {}
            empty = [index for index, (_, body) in enumerate(self.rules[symbol]) if not body]
            for index, (_, body) in enumerate(self.rules[symbol]):
                for word in self._first_words(body):
                    if first.setdefault(word, index) != index:
                        raise ValueError(f"ambiguous: two rules of {symbol!r} can begin with {word!r}")
            if len(empty) > 1 or any(body and self._can_vanish(body) for _, body in self.rules[symbol]):
                raise ValueError(f"ambiguous: {symbol!r} can be empty in two ways")
            self._first[symbol] = first
            self._nullable[symbol] = empty[0] if empty else None
        return self._first[symbol], self._nullable[symbol] is not None

    def _can_vanish(self, body: Sequence[str]) -> bool:
        return all(self._look_ahead(part)[1] for part in body)

    def _first_words(self, body: Sequence[str]) -> set[str]:
        words: set[str] = set()
        for part in body:
            first, vanishes = self._look_ahead(part)
            words |= first.keys()
            if not vanishes:
                break
        return words

    def _refuse_follow_conflicts(self) -> None:
        """Refuse a symbol that may be empty where the next word could also begin it."""
        follow: dict[str, set[str]] = {symbol: set() for symbol in self.rules}
        changed = True
        while changed:
            changed = False
            for symbol, alternatives in self.rules.items():
                for _, body in alternatives:
                    for position, part in enumerate(body):
                        if part not in self.rules:
                            continue
                        rest = body[position + 1 :]
                        after = self._first_words(rest) | (
                            follow[symbol] if self._can_vanish(rest) else set()
                        )
                        if not after <= follow[part]:
                            follow[part] |= after
                            changed = True
        for symbol, words in follow.items():
            if self._nullable[symbol] is not None and (both := words & self._first[symbol].keys()):
                raise ValueError(f"ambiguous: {min(both)!r} may begin {symbol!r} or what follows it")


def _cumulative(probabilities: Sequence[float]) -> list[float]:
    total, sums = 0.0, []
    for p in probabilities:
        total += p
        sums.append(total)
    return sums
