"""What each token is credited with: GRPO compares the responses of a prompt, PPO asks a critic."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from jaxtyping import Bool, Float
from torch import Tensor

from kedge.objective import (
    PolicyLoss,
    anchor_rewards,
    anchor_token_rewards,
    explained_variance,
    gae,
    group_advantages,
    masked_mean,
    terminal_rewards,
    whiten,
)
from kedge.rollout import Rollout
from kedge.training.config import AdvantageConfig, GaeConfig


@dataclass(frozen=True)
class Rewarded:
    """Responses with all that rewards are made of."""

    rollout: Rollout
    total: Float[Tensor, " R"]
    """Reward of each response, penalties taken off; NaN: unscorable."""
    learn: Bool[Tensor, " R"]
    """Responses that are learnt from."""
    old: Mapping[str, Float[Tensor, " N"]] | None
    """What the old policy's pass found."""
    loss: PolicyLoss

    @property
    def kl_in_reward(self) -> bool:
        """Whether the anchor joins the reward before the advantages are made: the classic form."""
        return self.loss.anchor.placement == "reward" and self.loss.anchor.gradient == "published"


@dataclass(frozen=True)
class Credit:
    """Advantages of the tokens; with a critic, what it said and what it is to say."""

    advantages: Float[Tensor, " N"]
    values: Float[Tensor, " N"] | None = None
    returns: Float[Tensor, " N"] | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)


def group_credit(config: AdvantageConfig, given: Rewarded) -> Credit:
    """GRPO: every token of a response has the response's advantage over the others that answer the prompt."""
    rollout, total = given.rollout, given.total
    if given.kl_in_reward and given.old is not None:
        anchor, beta = given.loss.anchor, given.loss.beta
        total = total + anchor_rewards(anchor, beta, given.old, rollout.mask, rollout.response_lengths)
    advantages = group_advantages(total, rollout.group, config.kind, std=config.std)
    zero = float(((advantages == 0) | ~given.learn).double().mean())
    return Credit(
        advantages.repeat_interleave(rollout.response_lengths), metrics={"advantage/zero_fraction": zero}
    )


def critic_credit(config: GaeConfig, given: Rewarded, values: Float[Tensor, " N"]) -> Credit:
    """PPO: a token has what came after it beyond what the critic expected before it.

    The reward of the response stands on its last token, and the response ends there, cut or not: the reward
    function has judged it as it is, so nothing is added for what might have followed.
    """
    rollout = given.rollout
    lengths = rollout.response_lengths
    rewards = terminal_rewards(given.total.to(values.dtype), lengths)
    if given.kl_in_reward and given.old is not None:
        rewards = rewards + anchor_token_rewards(given.loss.anchor, given.loss.beta, given.old, rollout.mask)
    advantages = gae(rewards, values, lengths, discount=config.discount, trace=config.trace)
    returns = advantages + values
    used = rollout.mask & given.learn.repeat_interleave(lengths)
    metrics = {
        "critic/value_mean": float(masked_mean(values, used)),
        "critic/return_mean": float(masked_mean(returns, used)),
        "critic/explained_variance": float(explained_variance(values, returns, used)),
    }
    return Credit(whiten(advantages, used) if config.whiten else advantages, values, returns, metrics)
