"""A step's responses with everything that is known of them before the first update."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from jaxtyping import Bool, Float, Int
from torch import Tensor

from kedge.rollout import Rollout


@dataclass(frozen=True)
class Experience:
    """Rollout, rewards, advantages, and what the old policy and the reference said; packed like the rollout.

    Shapes: R responses, N response tokens in their order.
    """

    rollout: Rollout
    rows: Int[Tensor, " R"]
    """The row of data that each response answers."""
    rewards: Mapping[str, Float[Tensor, " R"]]
    """Every reward by name and ``total``; NaN: unscorable."""
    advantages: Float[Tensor, " N"]
    learn: Bool[Tensor, " R"]
    """True where the response takes part in the policy loss (not unscorable, not cut and masked)."""
    reference_hidden: Float[Tensor, "N K"]
    old_log_probs: Float[Tensor, " N"] | None = None
    old_hidden: Float[Tensor, "N H"] | None = None
    correction: Float[Tensor, " N"] | None = None
    values: Float[Tensor, " N"] | None = None
    """Of the critic, before the first update."""
    returns: Float[Tensor, " N"] | None = None
    """What its values should have been."""
    statistics: Mapping[str, Float[Tensor, " N"]] | None = None
    """What the old policy's pass found, for the first update."""

    @property
    def learnt(self) -> Bool[Tensor, " N"]:
        """Tokens that are learnt from."""
        return self.rollout.mask & self.learn.repeat_interleave(self.rollout.response_lengths)

    def select(self, responses: Int[Tensor, " r"]) -> Experience:
        """Take some responses, in the order given."""
        tokens = self.rollout.rows(responses)

        def chosen(values: Tensor | None) -> Tensor | None:
            return values[tokens] if values is not None else None

        return replace(
            self,
            rollout=self.rollout.select(responses),
            rows=self.rows[responses],
            rewards={name: value[responses] for name, value in self.rewards.items()},
            learn=self.learn[responses],
            advantages=self.advantages[tokens],
            reference_hidden=self.reference_hidden[tokens],
            old_log_probs=chosen(self.old_log_probs),
            old_hidden=chosen(self.old_hidden),
            correction=chosen(self.correction),
            values=chosen(self.values),
            returns=chosen(self.returns),
            statistics={name: value[tokens] for name, value in self.statistics.items()}
            if self.statistics
            else None,
        )

    def state(self) -> dict[str, Any]:
        """Give it as a tree of tensors."""
        tree = {field.name: getattr(self, field.name) for field in fields(self)}
        return {**tree, "rollout": self.rollout.state(), "rewards": dict(self.rewards)}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Experience:
        """Restore ``state``."""
        return cls(**{**state, "rollout": Rollout.from_state(state["rollout"])})
