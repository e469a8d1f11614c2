"""Sums of values that come in clusters, with the standard error of their ratio.

The responses to one prompt, or the tokens of one text, are not independent: the independent draws are the
prompts, the texts. Whatever is averaged is first summed in each cluster; errors are those of the clusters.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor


def clustered_sums(
    values: Float[Tensor, " N"], cluster: Int[Tensor, " N"], clusters: int
) -> Float[Tensor, " C"]:
    """Sum values in each of the clusters 0 … C − 1, in float64.

    >>> clustered_sums(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0, 0, 1]), 2).tolist()
    [3.0, 4.0]
    """
    return torch.zeros(clusters, dtype=torch.float64).index_add_(0, cluster.cpu(), values.cpu().double())


def ratio_standard_error(numerators: Float[Tensor, " C"], denominators: Float[Tensor, " C"]) -> float:
    """Standard error of r = Σ a_c / Σ b_c over independent clusters.

        se(r) = √( C/(C − 1) · Σ (a_c − r·b_c)² ) / Σ b_c

    the linearisation of a ratio; with b_c = 1 it is the standard error of a mean. NaN for a single cluster.

    Source: Cochran, "Sampling Techniques", 1977, chapter 6.

    >>> ratio_standard_error(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 1.0]))
    1.0
    """
    count = len(numerators)
    if count < 2:
        return math.nan
    a, b = numerators.double(), denominators.double()
    rest = a - a.sum() / b.sum() * b
    return float((count / (count - 1) * rest.square().sum()).sqrt() / b.sum())


def clustered_standard_error(values: Float[Tensor, " R"], cluster: Tensor) -> float:
    """Standard error of the mean of values that come in clusters (the responses of one prompt).

    With cluster means m_c of C clusters of equal size: std(m_c)/√C. Values that are NaN are left out; NaN for
    fewer than two clusters.

    >>> clustered_standard_error(torch.tensor([1.0, 1.0, 3.0, 3.0]), torch.tensor([0, 0, 1, 1]))
    1.0
    """
    present = ~values.isnan()
    names, index = cluster[present].unique(return_inverse=True)
    if len(names) == 0:
        return math.nan
    kept = values[present]
    means = clustered_sums(kept, index, len(names)) / clustered_sums(torch.ones_like(kept), index, len(names))
    return ratio_standard_error(means, torch.ones_like(means))
