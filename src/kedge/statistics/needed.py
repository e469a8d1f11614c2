"""How many samples an interval of a wanted width needs."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kedge.statistics.clustered import clustered_sums
from kedge.statistics.interval import Estimate


@dataclass(frozen=True)
class Needed:
    """What an interval of a wanted half-width needs, others things being equal.

    Attributes:
        half_width: wanted, in the unit of the value.
        clusters: with as many samples in each as now; None where the interval's width is not known, or it is that of
            a single cluster.
        samples_per_cluster: with as many clusters as now; None where more samples alone cannot do it, or single ones
            do not tell.
    """

    half_width: float
    clusters: int | None
    samples_per_cluster: int | None


def samples_needed(
    estimate: Estimate, values: Float[Tensor, " R"], cluster: Int[Tensor, " R"], half_width: float
) -> Needed:
    """Say how many clusters, or samples in each, bring a mean's interval to a half-width.

    With C clusters of G samples the variance of the mean is σ_b²/C + σ_w²/(C·G): between clusters, within. Its
    parts are estimated by analysis of variance; the ratio of half-width and standard error is taken from the
    estimate. Of a single cluster the samples are the draws.

    Args:
        estimate: of the mean.
        values: the samples.
        cluster: of each sample, 0 … C − 1.
        half_width: wanted.

    Source: Cochran, "Sampling Techniques", 1977, chapter 10.

    >>> values, cluster = torch.tensor([0.0, 2.0, 0.0, 2.0]), torch.tensor([0, 0, 1, 1])
    >>> samples_needed(Estimate(1.0, 0.5, 0.0, 2.0), values, cluster, 0.5)
    Needed(half_width=0.5, clusters=8, samples_per_cluster=16)
    """
    if not math.isfinite(estimate.half_width) or half_width <= 0:
        return Needed(half_width, None, None)
    clusters = int(cluster.max()) + 1
    share = (estimate.half_width / half_width) ** 2
    if clusters == 1:
        return Needed(half_width, None, max(math.ceil(len(values) * share), 1))
    more = math.ceil(clusters * share)
    if not estimate.standard_error > 0:
        return Needed(half_width, max(more, 1), 1)
    between, within = variance_components(values, cluster)
    target = clusters * (half_width * estimate.standard_error / estimate.half_width) ** 2
    enough = math.ceil(within / (target - between)) if target > between else None
    return Needed(half_width, max(more, 1), None if enough is None else max(enough, 1))


def variance_components(values: Float[Tensor, " R"], cluster: Int[Tensor, " R"]) -> tuple[float, float]:
    """Estimate the variance between clusters and that within them, taken for 0 where every cluster has one sample.

    >>> variance_components(torch.tensor([0.0, 2.0, 0.0, 2.0]), torch.tensor([0, 0, 1, 1]))
    (0.0, 2.0)
    """
    clusters = int(cluster.max()) + 1
    values, cluster = values.double().cpu(), cluster.cpu()
    sizes = clustered_sums(torch.ones_like(values), cluster, clusters)
    means = clustered_sums(values, cluster, clusters) / sizes
    spare = len(values) - clusters
    within = float((values - means[cluster]).square().sum() / spare) if spare > 0 else 0.0
    whole = float(means.var()) if clusters > 1 else 0.0
    return max(0.0, whole - within * float((1 / sizes).mean())), within
