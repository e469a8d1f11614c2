"""Advantages: what a response or token is worth above a baseline."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kedge.objective.aggregate import masked_mean, pad, valid_positions

Kind = Literal["group", "mean", "leave_one_out", "batch"]
Std = Literal["population", "sample"]


def group_advantages(
    rewards: Float[Tensor, " R"],
    group: Int[Tensor, " R"],
    kind: Kind,
    *,
    std: Std = "sample",
    eps: float = 1e-6,
) -> Float[Tensor, " R"]:
    """Return the advantage of each response over the others that answer the same prompt.

    With r̄ and σ the mean and standard deviation of the scorable rewards of the group (n of them)::

        group          (r − r̄) / (σ + eps)                     GRPO
        mean           r − r̄                                   Dr. GRPO
        leave_one_out  r − mean of the other n−1               RLOO;  = n/(n−1) · (r − r̄)
        batch          (r − r̄) / (σ + eps) over the whole batch  REINFORCE with a whitened batch baseline

    A mean that includes the response itself scales the expected gradient by 1 − 1/n; leave-one-out is exact.

    Args:
        rewards: Reward of each response; NaN where it could not be scored.
        group: Prompt of each response; any integers, in any order.
        kind: Which of the four.
        std: ``sample`` divides by n−1, ``population`` by n (for ``group`` and ``batch``).
        eps: Added to σ, in the unit of the rewards.

    Returns:
        Advantages. Unscorable responses get 0 and take no part in mean and σ; a group whose rewards are all
        equal (or that has a single scorable one) gets exactly 0.

    Raises:
        ValueError: An infinite reward or a negative ``eps``.

    Source: Shao et al. 2024 (GRPO), arXiv 2402.03300; Liu et al. 2025 (Dr. GRPO), arXiv 2503.20783;
    Ahmadian et al. 2024 (RLOO), arXiv 2402.14740.

    >>> rewards, group = torch.tensor([1.0, 3.0, 5.0, 5.0]), torch.tensor([0, 0, 1, 1])
    >>> group_advantages(rewards, group, "leave_one_out").tolist()
    [-2.0, 2.0, 0.0, 0.0]
    """
    if bool(rewards.isinf().any()):
        raise ValueError("rewards must be finite, or NaN where a response could not be scored")
    if eps < 0:
        raise ValueError(f"eps must not be negative, got {eps}")
    labels = torch.zeros_like(group) if kind == "batch" else group
    order = torch.argsort(labels, stable=True)
    _, sizes = torch.unique_consecutive(labels[order], return_counts=True)
    valid = valid_positions(sizes, rewards.numel())
    table = _advantage_table(pad(rewards[order], valid), valid, kind, std, eps)
    return torch.empty_like(rewards).index_copy(0, order, table[valid])


def _advantage_table(table: Tensor, valid: Tensor, kind: Kind, std: Std, eps: float) -> Tensor:
    """Compute the advantages of a padded [groups, G] table, one group a row."""
    scored = valid & ~table.isnan()
    count = scored.sum(dim=1, keepdim=True)
    values = torch.where(scored, table, 0.0)
    centred = torch.where(scored, values - values.sum(dim=1, keepdim=True) / count.clamp(min=1), 0.0)
    if kind == "leave_one_out":
        centred = centred * count / (count - 1).clamp(min=1)
    elif kind != "mean":
        freedom = count - 1 if std == "sample" else count
        variance = centred.square().sum(dim=1, keepdim=True) / freedom.clamp(min=1)
        centred = centred / (variance.sqrt() + eps)
    if not table.numel():
        return centred
    highest = torch.where(scored, table, -torch.inf).amax(dim=1, keepdim=True)
    lowest = torch.where(scored, table, torch.inf).amin(dim=1, keepdim=True)
    return torch.where(scored & (highest > lowest), centred, 0.0)


def reward_to_go(
    values: Float[Tensor, " N"], lengths: Int[Tensor, " R"], *, inclusive: bool
) -> Float[Tensor, " N"]:
    """Sum what is still to come in the response: Σ_{u≥t} v_u, or Σ_{u>t} v_u.

    Args:
        values: Per-token values in packed order.
        lengths: Tokens of each response.
        inclusive: Whether the token's own value counts.

    Returns:
        The sum for each token, in the unit of ``values``.

    Raises:
        ValueError: The lengths do not sum to N.

    >>> reward_to_go(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([2, 1]), inclusive=False).tolist()
    [2.0, 0.0, 0.0]
    """
    valid = valid_positions(lengths, values.numel())
    to_go = pad(values, valid).flip(1).cumsum(dim=1).flip(1)[valid]
    return to_go if inclusive else to_go - values


def position_baseline(
    to_go: Float[Tensor, " N"], lengths: Int[Tensor, " R"], group: Int[Tensor, " R"]
) -> Float[Tensor, " N"]:
    """Average the to-go of the *other* responses of the group at the same position.

    b_{i,t} = Σ_{j≠i} to_go_{j,t} / (n−1), a response that has ended counting as 0. It does not depend on
    response i, so subtracting it leaves the expected gradient as it is.

    Args:
        to_go: Per-token sums of what is to come, in packed order.
        lengths: Tokens of each response.
        group: Prompt of each response.

    Returns:
        The baseline of each token; 0 for a response that is alone in its group.

    Raises:
        ValueError: The lengths do not sum to N.

    >>> position_baseline(torch.tensor([4.0, 2.0, 6.0]), torch.tensor([2, 1]), torch.tensor([0, 0])).tolist()
    [6.0, 0.0, 4.0]
    """
    valid = valid_positions(lengths, to_go.numel())
    table = pad(to_go, valid)
    _, index, sizes = torch.unique(group, return_inverse=True, return_counts=True)
    sums = table.new_zeros(sizes.numel(), table.shape[1]).index_add(0, index, table)
    others = (sizes[index] - 1).clamp(min=1)[:, None]
    baseline = (sums[index] - table) / others
    return torch.where(sizes[index][:, None] > 1, baseline, 0.0)[valid]


def whiten(
    advantages: Float[Tensor, " N"],
    mask: Bool[Tensor, " N"],
    *,
    mean: float | None = None,
    std: float | None = None,
) -> Float[Tensor, " N"]:
    """Shift and scale the advantages to mean 0 and standard deviation 1 over the unmasked tokens of the batch.

        (A − mean)/std,   std² = Σ m·(A − mean)²/Σ m

    The unit of the reward drops out, and with it the meaning of a coefficient in reward per nat: β, the penalty and
    the entropy bonus then count in standard deviations of the advantage.

    Args:
        advantages: Of every token, in packed order.
        mask: Tokens that count: drawn by the policy, in a response that could be scored.
        mean: That of the global batch, where this is one of its parts; by default that of what is given.
        std: The same of the standard deviation.

    Returns:
        Whitened advantages; 0 for masked tokens, and for all where they are equal.

    Raises:
        ValueError: ``std`` is negative.

    >>> whiten(torch.tensor([1.0, 3.0, 9.0]), torch.tensor([True, True, False])).tolist()
    [-1.0, 1.0, 0.0]
    """
    if std is not None and std < 0:
        raise ValueError(f"std must not be negative, got {std}")
    centre = masked_mean(advantages, mask) if mean is None else mean
    shifted = torch.where(mask, advantages - centre, 0.0)
    if std is not None:
        return shifted / std if std else torch.zeros_like(shifted)
    if not bool(mask.any()):
        return shifted
    low, high = advantages[mask].aminmax()
    if bool(low == high):
        return torch.zeros_like(shifted)
    return shifted / masked_mean(shifted.square(), mask).sqrt()
