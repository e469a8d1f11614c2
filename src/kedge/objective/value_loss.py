"""The critic's loss, with what it has explained."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kedge.objective.aggregate import masked_mean


def value_loss(
    values: Float[Tensor, " N"],
    old_values: Float[Tensor, " N"],
    returns: Float[Tensor, " N"],
    *,
    clip: float | None,
) -> Float[Tensor, " N"]:
    """Return half the squared error of each value, as if it had moved by ``clip`` at most, if that is worse.

        ½·max((V − R)², (clip(V, V_old − c, V_old + c) − R)²)

    A value that has come closer to its return by more than c has no gradient; one that has gone away from it is
    drawn back. Weigh the tokens with `aggregation_weights`.

    Args:
        values: V of the critic that is updated; the gradient goes here alone.
        old_values: V of the critic when the responses were scored.
        returns: What the values should be: advantages + old values.
        clip: c > 0, in the unit of the rewards; None for the squared error alone.

    Raises:
        ValueError: ``clip`` is not above 0.

    Source: Schulman et al. 2017, arXiv 1707.06347, in the form of OpenAI Baselines' ppo2.

    >>> value, old, target = torch.tensor([1.0]), torch.tensor([0.0]), torch.tensor([1.0])
    >>> round(value_loss(value, old, target, clip=0.2).item(), 6)
    0.32
    """
    if clip is not None and not clip > 0:
        raise ValueError(f"clip must be above 0, or None for no clipping, got {clip}")
    returns, old_values = returns.detach(), old_values.detach()
    squared = (values - returns).square()
    if clip is not None:
        near = old_values + (values - old_values).clamp(-clip, clip)
        squared = torch.maximum(squared, (near - returns).square())
    return 0.5 * squared


def explained_variance(
    values: Float[Tensor, " N"], returns: Float[Tensor, " N"], mask: Bool[Tensor, " N"]
) -> Float[Tensor, ""]:
    """Return the share of the returns' variance that the values explain: 1 − Var(R − V)/Var(R).

    1: the values are the returns, up to a constant. 0: no better than a constant. Below 0: worse than that.

    Args:
        values: V of each token, before the update.
        returns: R of each token.
        mask: Tokens that count.

    Returns:
        At most 1, detached; NaN where the returns are all equal, so that there is nothing to explain.

    >>> returns, mask = torch.tensor([1.0, 3.0]), torch.tensor([True, True])
    >>> explained_variance(torch.tensor([1.5, 2.5]), returns, mask).item()
    0.75
    """
    values, returns = values.detach(), returns.detach()
    if not bool(mask.any()) or bool((returns[mask] == returns[mask][0]).all()):
        return torch.full((), math.nan, dtype=values.dtype, device=values.device)
    return 1 - _variance(returns - values, mask) / _variance(returns, mask)


def _variance(values: Tensor, mask: Tensor) -> Tensor:
    return masked_mean((values - masked_mean(values, mask)).square(), mask)
