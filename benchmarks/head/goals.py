"""What is asked of the figures, with the verdicts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.head.kedge_side import REDUCE, SCORE
from benchmarks.head.losses import CACHED, CROSS_ENTROPY, EXACT, SAMPLED
from benchmarks.head.peers import CCE, LIGER, LIGER_CE, TRL
from benchmarks.head.plain import COMPILED, DENSE, LINEAR
from benchmarks.head.products import BY_TORCH
from benchmarks.head.results import Result, Row
from benchmarks.head.timing import ratio

LIMITS = {
    "time/products": 1.12,
    "time/own products": 1.12,
    "time/as written": 0.4,
    "time/dense": 0.4,
    "time/liger": 0.2,
    "memory/dense": 0.3,
    "exact/sampled": 1.1,
    "cross-entropy/products": 1.15,
    "cross-entropy/own products": 1.15,
    "cross-entropy/peers": 1.0,
    "scaling/time": 0.1,
    "scaling/memory": 0.1,
    "gpu/exact": 1.0,
    "gpu/sampled": 1.0,
    "gpu/memory": 1.0,
}
"""The most that each figure may be. Figures of "gpu" are multiples of the goals in GPU_GOALS."""

GPU_SIZE = (16384, 151936)
GPU_GOALS = {
    2048: {"exact": 0.085, "sampled": 0.058, "memory": 3.9e9},
    4096: {"exact": 0.150, "sampled": 0.102, "memory": 5.8e9},
}
"""Seconds and bytes on an H100, in bf16, by width."""


@dataclass(frozen=True)
class Goal:
    """A figure with its limit: no limit is for information, no figure could not be had."""

    name: str
    where: str
    what: str
    figure: float | None
    limit: float | None

    @property
    def verdict(self) -> str:
        if self.figure is None:
            return "not checked"
        if self.limit is None:
            return "for information"
        return "pass" if self.figure <= self.limit else "fall short"

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "verdict": self.verdict}


def taken(result: Result) -> str:
    """Return the fast backend, if it took part."""
    found = (each for each in ("triton", "compiled") if result.default(EXACT, f"{REDUCE} {each}"))
    return next(found, "chunked")


def goals_of(result: Result, limits: dict[str, float | None]) -> Iterator[Goal]:
    """Judge Kedge at its default chunk with the backend that training takes, the faster one."""
    backend, where = taken(result), str(result.size)
    family = f"{REDUCE} {backend}"

    def goal(name: str, what: str, figure: float | None) -> Goal:
        return Goal(name, where, what, figure, limits.get(name))

    exact, sampled = result.default(EXACT, family), result.default(SAMPLED, family)
    written = [*result.racing(EXACT, DENSE), *result.racing(SAMPLED, TRL)]
    dense = [*written, *result.racing(EXACT, COMPILED), *result.racing(SAMPLED, DENSE, COMPILED)]
    usual, fastest_dense = (min(rows, key=lambda row: row.median, default=None) for rows in (written, dense))
    whole, liger = result.fastest(EXACT, DENSE), result.fastest(SAMPLED, LIGER)
    yield from _product_goals(result, exact, family, goal, "time")
    yield goal("time/as written", f"{family} ÷ {_named(usual, 'dense')}", _times(exact, usual))
    yield goal("time/dense", f"{family} ÷ {_named(fastest_dense, 'dense')}", _times(exact, fastest_dense))
    yield goal("time/liger", f"{family} ÷ {_named(liger, 'liger')}", _times(exact, liger))
    yield goal("memory/dense", f"{family} ÷ dense exact KL, incremental", _memory(exact, whole))
    yield goal("exact/sampled", f"{family}: exact ÷ sampled in the same pass", _times(exact, sampled))
    yield from _cross_entropy_goals(result, family, goal)
    yield from _information(result, backend, goal)
    yield from _gpu_goals(result, exact, sampled, goal)


def _product_goals(result: Result, own: Row | None, what: str, goal: Any, group: str) -> Iterator[Goal]:
    """Judge by the products that PyTorch has for everybody, then by the fastest that there are."""
    task = EXACT if own is None else own.contender.task
    bare, fastest = result.floor(task, BY_TORCH), result.floor(task)
    yield goal(f"{group}/products", f"{what} ÷ {BY_TORCH} by torch.mm", _times(own, bare))
    yield goal(f"{group}/own products", f"{what} ÷ {_named(fastest, BY_TORCH)}", _times(own, fastest))


def _cross_entropy_goals(result: Result, family: str, goal: Any) -> Iterator[Goal]:
    own, peer = result.default(CROSS_ENTROPY, family), result.fastest(CROSS_ENTROPY, CCE, LINEAR, LIGER_CE)
    what = f"cross-entropy, {family}"
    yield from _product_goals(result, own, what, goal, "cross-entropy")
    yield goal("cross-entropy/peers", f"{what} ÷ {_named(peer, 'its peers')}", _times(own, peer))


def _information(result: Result, backend: str, goal: Any) -> Iterator[Goal]:
    family = f"{REDUCE} {backend}"
    exact = result.default(EXACT, family)
    others = {
        "exact KL ÷ sampled with log ρ(a) cached": result.default(CACHED, family),
        "exact KL, default chunk ÷ the fastest chunk": result.fastest(EXACT, family),
        "reduce ÷ score": result.fastest(EXACT, f"{SCORE} {backend}"),
        "exact KL ÷ dense exact KL, compiled": result.fastest(EXACT, COMPILED),
    }
    for what, other in others.items():
        yield goal("", what, _times(exact, other))
    own, dense = result.default(CROSS_ENTROPY, family), result.fastest(CROSS_ENTROPY, DENSE, COMPILED)
    yield goal("", "cross-entropy ÷ the faster dense one", _times(own, dense))


def _gpu_goals(result: Result, exact: Row | None, sampled: Row | None, goal: Any) -> Iterator[Goal]:
    size = result.size
    if result.element_bytes != 2 or (size.rows, size.tokens) != GPU_SIZE or size.width not in GPU_GOALS:
        return
    asked = GPU_GOALS[size.width]
    for name, row in (("exact", exact), ("sampled", sampled)):
        figure = row.median / asked[name] if row else None
        yield goal(f"gpu/{name}", f"{name} ÷ {asked[name] * 1e3:.0f} ms", figure)
    memory = exact.peak["incremental"] / asked["memory"] if exact and exact.peak else None
    yield goal("gpu/memory", f"incremental memory ÷ {asked['memory'] / 1e9:.1f} GB", memory)


def _times(one: Row | None, other: Row | None) -> float | None:
    if one is None or other is None:
        return None
    return ratio(one.seconds, other.seconds)


def _memory(one: Row | None, other: Row | None) -> float | None:
    if one is None or other is None or one.peak is None or other.peak is None:
        return None
    return one.peak["incremental"] / max(1, other.peak["incremental"])


def _named(row: Row | None, otherwise: str) -> str:
    return otherwise if row is None else row.contender.name
