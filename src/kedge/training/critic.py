"""The critic at work: values of a step's responses, its own updates on them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from kedge.models import Critic
from kedge.objective import aggregation_weights, value_loss
from kedge.rollout import Rollout
from kedge.training.config import CriticConfig
from kedge.training.experience import Experience
from kedge.training.optimization import Updater
from kedge.training.scoring import Scorer, parts

SHARED_COEFFICIENT = 0.5


@dataclass
class CriticWork:
    """What a critic does in a step: it says values once, and learns the returns in every update.

    On a backbone of its own it has its own optimizer and passes; on the policy's it reads the policy's hidden
    states, and its loss joins the policy's.
    """

    critic: Critic
    config: CriticConfig
    scorer: Scorer
    steps: int
    updater: Updater | None = field(init=False)
    """Of a critic on its own backbone."""

    def __post_init__(self) -> None:
        own = self.critic.backbone is not None
        self.updater = (
            Updater(self.critic, self.config.optimizer, self.steps, "critic.optimizer") if own else None
        )

    @property
    def shared(self) -> bool:
        """Whether it reads the policy's hidden states."""
        return self.critic.backbone is None

    @torch.no_grad()
    def values(self, rollout: Rollout, policy_hidden: Float[Tensor, "N H"] | None) -> Float[Tensor, " N"]:
        """Value of the state before each response token; ``policy_hidden`` is for a shared backbone."""
        if self.critic.backbone is not None:
            policy_hidden = self.scorer.hidden_in_parts(self.critic.backbone, rollout)
        assert policy_hidden is not None  # the gatherer's pass of the old policy
        values: Tensor = self.critic(policy_hidden)
        return values

    def update(self, step: int, batch: Experience) -> dict[str, float]:
        """Take one step of the critic's own optimizer towards the returns of a minibatch."""
        if self.critic.backbone is None or self.updater is None:
            return {}
        backbone = self.critic.backbone

        def accumulate() -> float:
            total = 0.0
            for rows, part in parts(batch.rollout, self.scorer.compute.micro_batch):
                loss = self.losses(self.scorer.hidden(backbone, part), batch, rows).sum()
                torch.autograd.backward(loss)
                total += float(loss.detach())
            return total

        applied = self.updater.update(step, accumulate) or {}
        return {f"critic/{name.replace('/', '_')}": value for name, value in applied.items()}

    def losses(self, hidden: Float[Tensor, "n H"], batch: Experience, rows: slice) -> Float[Tensor, " n"]:
        """Give the share of some tokens in the value loss of a minibatch: its mean over all tokens learnt from."""
        assert batch.values is not None
        assert batch.returns is not None
        values = self.critic(hidden)
        lengths = batch.rollout.response_lengths
        weights = aggregation_weights(lengths, batch.learnt, "token_mean", dtype=values.dtype)
        return weights[rows] * value_loss(
            values, batch.values[rows], batch.returns[rows], clip=self.config.clip
        )

    @property
    def coefficient(self) -> float:
        """What the value loss is multiplied by in the policy's loss; 0 for a critic that has its own."""
        return (self.config.coefficient or SHARED_COEFFICIENT) if self.shared else 0.0

    def state(self) -> dict[str, Any]:
        """Give weights and, of its own, the optimizer."""
        return {
            "weights": dict(self.critic.state_dict()),
            "optimizer": self.updater.state_dict() if self.updater is not None else None,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take up ``state``."""
        self.critic.load_state_dict(state["weights"])
        if self.updater is not None:
            self.updater.load_state_dict(state["optimizer"])
