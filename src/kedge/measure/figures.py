"""The figures of one question, from the values of its tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kedge.divergence import k1, k3
from kedge.measure.config import MeasureConfig
from kedge.measure.questions import Question
from kedge.measure.table import TokenTable
from kedge.statistics import Estimate, Needed, clustered_sums, estimate_ratios, samples_needed

QUANTILES = {"median": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99, "p99.9": 0.999}
"""Of the per-token KL, by name."""
CHANGE_QUANTILES = {"p0.1": 0.001, "p1": 0.01, "p5": 0.05, "p25": 0.25, **QUANTILES}
"""Of the change of the given token's probability."""

_NEVER_NEGATIVE = frozenset(
    {"reverse_kl", "forward_kl", "k3", "policy_entropy", "reference_entropy", "probability_change_squared"}
)


@dataclass(frozen=True)
class Figures:
    """What a question's tokens say.

    Attributes:
        estimates: means with their uncertainty, by name.
        distribution: of the per-token KLs and of the change of probability: quantiles and extremes, by name.
        correlation: of the two log-probabilities of the given tokens (Pearson); NaN if one does not vary.
        needed: what an interval of the wanted width needs, of the question's first headline figure.
    """

    estimates: dict[str, Estimate]
    distribution: dict[str, dict[str, float]]
    correlation: float
    needed: Needed


def figures(table: TokenTable, question: Question, config: MeasureConfig) -> Figures:
    """Sum a question up.

    Args:
        table: at least one token, its clusters and responses numbered in any way.
        question: which one.
        config: confidence, resamples, seed and the wanted width.
    """
    responses, of_response = table.response.unique(return_inverse=True)
    clusters, of_cluster = table.cluster.unique(return_inverse=True)
    count = len(responses)
    cluster_of = torch.zeros(count, dtype=torch.int64)
    cluster_of[of_response] = of_cluster
    per_token = {name: values.double() for name, values in _per_token(table, question)}
    unit, units = independent(cluster_of, len(clusters), count)
    sums = {name: clustered_sums(values, unit[of_response], units) for name, values in per_token.items()}
    tokens = clustered_sums(torch.ones(table.count), unit[of_response], units)
    sizes = clustered_sums(torch.ones(count), unit, units)
    names = list(sums)
    rows = [(sums[name], tokens) for name in names]
    whole = [name for name in names if question.sampled_from is not None and name in _whole(question)]
    rows += [(sums[name], sizes) for name in whole]
    found = estimate_ratios(
        torch.stack([above for above, _ in rows]),
        torch.stack([below for _, below in rows]),
        confidence=config.confidence,
        resamples=config.resamples,
        seed=config.seed,
    )
    labels = names + [f"{name}_per_response" for name in whole]
    estimates = dict(zip(labels, found, strict=True))
    return Figures(
        estimates=_derived({label: _bounded(estimate, label) for label, estimate in estimates.items()}),
        distribution={
            "reverse_kl": describe(table.reverse_kl, QUANTILES),
            "forward_kl": describe(table.forward_kl, QUANTILES),
            "probability_change": describe(per_token["probability_change"], CHANGE_QUANTILES),
        },
        correlation=correlation(table.policy_log_prob, table.reference_log_prob),
        needed=_needed(estimates, per_token, of_response, cluster_of, question, config),
    )


def independent(
    cluster_of: Int[Tensor, " R"], clusters: int, responses: int
) -> tuple[Int[Tensor, " R"], int]:
    """Say what counts as drawn independently: clusters, or the responses themselves where there is one cluster.

    With a single prompt the figures are about that prompt, and its responses are independent draws.
    """
    return (cluster_of, clusters) if clusters > 1 else (torch.arange(responses), responses)


def describe(values: Float[Tensor, " N"], quantiles: dict[str, float]) -> dict[str, float]:
    """Quantiles (linear between neighbours), smallest and largest of some values.

    >>> describe(torch.tensor([0.0, 1.0, 4.0]), {"median": 0.5})
    {'min': 0.0, 'median': 1.0, 'max': 4.0}
    >>> describe(torch.tensor([1.0, math.inf, math.inf]), {"p75": 0.75})
    {'min': 1.0, 'p75': inf, 'max': inf}
    """
    ordered = values.double().sort().values
    last = len(ordered) - 1
    found = {"min": float(ordered[0])}
    for name, share in quantiles.items():
        below = math.floor(share * last)
        low, high = float(ordered[below]), float(ordered[min(below + 1, last)])
        weight = share * last - below
        found[name] = low if weight == 0 or low == high else low + weight * (high - low)
    return {**found, "max": float(ordered[-1])}


def correlation(one: Float[Tensor, " N"], other: Float[Tensor, " N"]) -> float:
    """Pearson's correlation; NaN where one of them does not vary.

    >>> round(correlation(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 4.0, 6.0])), 6)
    1.0
    """
    a, b = one.double() - one.double().mean(), other.double() - other.double().mean()
    scale = float(a.norm() * b.norm())
    return max(-1.0, min(1.0, float(a @ b) / scale)) if scale > 0 else math.nan


def _per_token(table: TokenTable, question: Question) -> Iterable[tuple[str, Tensor]]:
    """Every value that is averaged over tokens, by the name of its mean."""
    policy, reference = table.policy_log_prob, table.reference_log_prob
    yield "reverse_kl", table.reverse_kl
    yield "forward_kl", table.forward_kl
    if question.sampled_from is not None:
        drawn, other = (policy, reference) if question.sampled_from == "policy" else (reference, policy)
        yield "k1", k1(drawn, other)
        yield "k3", k3(drawn, other)
    yield "policy_entropy", table.policy_entropy
    yield "reference_entropy", table.reference_entropy
    yield "policy_cross_entropy", -policy
    yield "reference_cross_entropy", -reference
    yield "cross_entropy_change", reference - policy
    change = policy.double().exp() - reference.double().exp()
    yield "probability_change", change
    yield "probability_change_squared", change.square()
    yield "same_top_token", (table.policy_top == table.reference_top).double()


def _whole(question: Question) -> tuple[str, ...]:
    """What is also summed along whole responses."""
    return (*question.headline, "k1", "k3")


def _bounded(estimate: Estimate, name: str) -> Estimate:
    """Keep an interval within what the value can be."""
    if name.removesuffix("_per_response") in _NEVER_NEGATIVE:
        return replace(estimate, low=max(estimate.low, 0.0) if estimate.low == estimate.low else estimate.low)
    if name == "same_top_token":
        return replace(estimate, low=_clip(estimate.low), high=_clip(estimate.high))
    return estimate


def _clip(share: float) -> float:
    return share if math.isnan(share) else min(1.0, max(0.0, share))


def _derived(estimates: dict[str, Estimate]) -> dict[str, Estimate]:
    """Add perplexities, their ratio and the root mean square: monotone functions of a mean, so of its bounds."""
    rest = dict(estimates)
    square = rest.pop("probability_change_squared")
    rest["probability_change_rms"] = _mapped(square, math.sqrt, lambda x: 0.5 / math.sqrt(x) if x > 0 else 0)
    for name in ("policy", "reference"):
        rest[f"{name}_perplexity"] = _mapped(rest[f"{name}_cross_entropy"], _exp, _exp)
    rest["perplexity_ratio"] = _mapped(rest["cross_entropy_change"], _exp, _exp)
    return rest


def _mapped(
    estimate: Estimate, function: Callable[[float], float], slope: Callable[[float], float]
) -> Estimate:
    """Carry an estimate over to an increasing function of its value; the standard error goes by the slope."""
    value = estimate.value
    low, high = (function(bound) for bound in (estimate.low, estimate.high))
    return Estimate(function(value), slope(value) * estimate.standard_error, low, high)


def _exp(x: float) -> float:
    return math.inf if x > 700 else math.exp(x)


def _needed(
    estimates: dict[str, Estimate],
    per_token: dict[str, Tensor],
    of_response: Int[Tensor, " N"],
    cluster_of: Int[Tensor, " R"],
    question: Question,
    config: MeasureConfig,
) -> Needed:
    """What the first headline figure needs: per response where responses are sampled, per token of texts.

    Args:
        estimates: not clipped at 0, where an interval looks shorter than it is.
        per_token: values of each token, by name.
        of_response: the response of each token.
        cluster_of: the cluster of each response.
        question: which one.
        config: for the wanted width.
    """
    name, count = question.headline[0], len(cluster_of)
    values = clustered_sums(per_token[name], of_response, count)
    estimate = estimates[name]
    if question.sampled_from is not None:
        estimate = estimates[f"{name}_per_response"]
    if not math.isfinite(estimate.value):
        return Needed(math.nan, None, None)
    needed = samples_needed(estimate, values, cluster_of, config.width * estimate.value)
    if question.sampled_from is None and needed.clusters is not None:  # a text has the windows that it has
        needed = replace(needed, samples_per_cluster=None)
    return needed
