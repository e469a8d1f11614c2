"""Generalised advantage estimation: advantages of tokens from a critic's values."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kedge.objective.aggregate import pad, per_response_sum, spread, valid_positions


def gae(
    rewards: Float[Tensor, " N"],
    values: Float[Tensor, " N"],
    lengths: Int[Tensor, " R"],
    *,
    discount: float = 1.0,
    trace: float = 0.95,
) -> Float[Tensor, " N"]:
    """Return the advantage of each token over what the critic expected before it was drawn.

    With δ_t = r_t + γ·V_{t+1} − V_t, from the end of each response to its start::

        A_t = δ_t + γλ·A_{t+1}

    Behind the last token there is nothing: the reward judges the response as it stands, cut or not. The returns
    that the critic is to learn are advantages + values. λ = 1 gives the reward-to-go minus the value, which the
    policy gradient takes without bias whatever the critic says; λ = 0 gives δ_t, without bias only if the critic
    is right.

    Args:
        rewards: Reward of each token, in packed order: `terminal_rewards`, to which `anchor_token_rewards` may
            be added.
        values: The critic's V_t, of the state before each token.
        lengths: Tokens of each response.
        discount: γ, above 0 and at most 1.
        trace: λ, from 0 to 1.

    Returns:
        Advantages, detached, in the unit of the rewards. A response with a NaN among its rewards could not be
        scored: all of its tokens get 0, and the mask of the policy's and of the critic's loss is to leave it out.

    Raises:
        ValueError: γ or λ is out of range, or the lengths do not sum to N.

    Source: Schulman, Moritz, Levine, Jordan, Abbeel 2016, arXiv 1506.02438.

    >>> rewards, values = torch.tensor([0.0, 1.0]), torch.tensor([0.5, 0.25])
    >>> gae(rewards, values, torch.tensor([2]), trace=1.0).tolist()
    [0.5, 0.75]
    """
    if not 0 < discount <= 1:
        raise ValueError(f"discount must be above 0 and at most 1, got {discount}")
    if not 0 <= trace <= 1:
        raise ValueError(f"trace must be from 0 to 1, got {trace}")
    rewards, values = rewards.detach(), values.detach()
    valid = valid_positions(lengths, values.numel())
    if not values.numel():
        return values
    scorable = spread(per_response_sum(rewards.isnan().to(values.dtype), lengths) == 0, lengths)
    now = pad(values, valid)
    following = torch.cat([now[:, 1:], now.new_zeros(len(now), 1)], dim=1)
    surprise = pad(torch.where(scorable, rewards, 0.0), valid) + discount * following - now
    columns = list(surprise.unbind(1))
    for t in range(len(columns) - 2, -1, -1):
        columns[t] = columns[t] + discount * trace * columns[t + 1]
    return torch.where(scorable, torch.stack(columns, dim=1)[valid], 0.0)


def terminal_rewards(rewards: Float[Tensor, " R"], lengths: Int[Tensor, " R"]) -> Float[Tensor, " N"]:
    """Put the reward of each response on its last token, 0 on all others.

    Args:
        rewards: Reward of each response; NaN where it could not be scored.
        lengths: Tokens of each response, at least 1.

    Raises:
        ValueError: A response without tokens, whose reward would be lost.

    >>> terminal_rewards(torch.tensor([3.0, 5.0]), torch.tensor([2, 1])).tolist()
    [0.0, 3.0, 5.0]
    """
    if lengths.numel() and int(lengths.min()) < 1:
        raise ValueError("a response without tokens has no last token to carry its reward")
    return rewards.new_zeros(int(lengths.sum())).index_copy(0, lengths.cumsum(0) - 1, rewards)
