"""The responses and texts of an audit that a page shows, token by token."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

from kedge.report.audit import BOTH, number, rounded, sizes

MAX_TOKENS = 8000
"""Tokens of a question that a page holds: about 0.6 MB of it."""
MAX_LENGTH = 800
"""Tokens of one response."""
_VALUES = (
    *("policy_log_prob", "reference_log_prob", "reverse_kl", "forward_kl"),
    *("policy_entropy", "reference_entropy"),
)


def audit_responses(
    question: Mapping[str, Any], tokens: Any, *, most: int = MAX_TOKENS, longest: int = MAX_LENGTH
) -> dict[str, Any]:
    """Choose responses and give the values of their tokens.

    Half of the room goes to those of the largest KL per token (of the first headline), half to the first ones of
    the data.

    Args:
        question: Its part of ``measure.json``.
        tokens: Its rows of ``tokens.parquet``.
        most: Tokens altogether.
        longest: Tokens of a response.

    Returns:
        ``texts``, every text that occurs; ``rows``, in the order of the data, each with its ``cluster``, ``nth``
        of that, ``before`` (what is read before it), its ``count`` of tokens, its ``means``, and for each token
        shown its values, texts by their place in ``texts``; ``total`` and ``total_tokens`` of the question; its
        kind of ``cluster``; ``scale``, the KL in nats at which a token is coloured in full.
    """
    lengths = sizes(tokens)
    starts = [0, *accumulate(lengths)]
    clusters = tokens["cluster"].take(starts[:-1]).to_pylist()
    first = {cluster: place for place, cluster in reversed(list(enumerate(clusters)))}
    means = {
        name: [_mean(tokens[name], start, count) for start, count in zip(starts, lengths, strict=False)]
        for name in BOTH
    }
    begins = {row["cluster"]: row["text"] for row in question["by_cluster"]}
    texts = _Texts()
    rows = []
    for place in choose([min(count, longest) for count in lengths], means[question["headline"][0]], most):
        part = tokens.slice(starts[place], min(lengths[place], longest)).to_pydict()
        cluster = clusters[place]
        before = begins.get(cluster, "")
        if question["cluster"] == "text":
            before = read_before(before, "".join(part["text"])) if place == first[cluster] else ""
        rows.append(
            {
                "cluster": cluster,
                "nth": place - first[cluster],
                "before": texts.place(before),
                "count": lengths[place],
                "means": {name: rounded(values[place]) for name, values in means.items()},
                "text": [texts.place(text) for text in part["text"]],
                "id": part["token"],
                **{name: [rounded(value) for value in part[name]] for name in _VALUES},
                "policy_top": [texts.place(text) for text in part["policy_top_text"]],
                "reference_top": [texts.place(text) for text in part["reference_top_text"]],
            }
        )
    return {
        "texts": texts.found,
        "rows": rows,
        "total": len(lengths),
        "total_tokens": starts[-1],
        "cluster": question["cluster"],
        "scale": _scale(question),
    }


def choose(lengths: Sequence[int], means: Sequence[float], most: int) -> list[int]:
    """Choose responses with at most so many tokens together, one at least, half of the room for the largest means.

    >>> choose([4, 4, 4, 4], [0.1, 0.2, 0.3, 0.4], most=8)
    [0, 3]
    """
    largest = sorted(range(len(lengths)), key=lambda place: (-means[place], place))
    chosen = _fitting(largest, lengths, most // 2)
    room = most - sum(lengths[place] for place in chosen)
    chosen += _fitting([place for place in range(len(lengths)) if place not in chosen], lengths, room)
    return sorted(chosen or largest[:1])


def read_before(begins: str, scored: str) -> str:
    """Tell what of a text is only read: what stands before its scored part.

    Args:
        begins: how the text begins, perhaps not to its end.
        scored: its scored part.

    >>> read_before("Once upon a time", " upon a time"), read_before("Once upon", " upon a time")
    ('Once', 'Once')
    """
    return next((begins[:end] for end in range(len(begins)) if scored.startswith(begins[end:])), begins)


class _Texts:
    """Texts without repetition."""

    def __init__(self) -> None:
        self.found: list[str] = []
        self._places: dict[str, int] = {}

    def place(self, text: str) -> int:
        """Say where a text stands, put there if it is new."""
        if text not in self._places:
            self._places[text] = len(self.found)
            self.found.append(text)
        return self._places[text]


def _fitting(places: Sequence[int], lengths: Sequence[int], room: int) -> list[int]:
    """Take places from the first on while there is room."""
    ends = accumulate(lengths[place] for place in places)
    return [place for place, end in zip(places, ends, strict=True) if end <= room]


def _mean(column: Any, start: int, count: int) -> float:
    from pyarrow import compute

    value = compute.mean(column.slice(start, count)).as_py()
    return value if isinstance(value, float) and not math.isnan(value) else -math.inf


def _scale(question: Mapping[str, Any]) -> float:
    """Pick the KL of full colour: what 99 of 100 tokens stay below, at least what rounding makes."""
    high = [number(question["distribution"][name]["p99"]) for name in BOTH]
    floor = [number(side["largest"]) for side in question["noise_floor"].values()]
    found = max([1e-6, *high, *(10 * value for value in floor)], key=lambda value: (value < math.inf, value))
    return float(f"{found:.2g}")
