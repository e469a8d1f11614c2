"""The values of every token that two models were compared on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class TokenTable:
    """One row a scored token, in the order of responses and positions; KLs and entropies in nats.

    Attributes:
        cluster: the prompt or text, by its place in the data.
        response: the response (of all responses to all prompts), or the window of a text.
        position: of the token in the response, or in the scored part of the window; from 0.
        token: its id.
        policy_log_prob: log π(token).
        reference_log_prob: log ρ(token).
        reverse_kl: KL(π‖ρ) of the two distributions that the token was one draw of, over the whole vocabulary.
        forward_kl: KL(ρ‖π) of the same two.
        policy_entropy: H(π).
        reference_entropy: H(ρ).
        policy_top: id of the policy's most probable token.
        reference_top: id of the reference's.

    >>> TokenTable.empty().count
    0
    """

    cluster: Int[Tensor, " N"]
    response: Int[Tensor, " N"]
    position: Int[Tensor, " N"]
    token: Int[Tensor, " N"]
    policy_log_prob: Float[Tensor, " N"]
    reference_log_prob: Float[Tensor, " N"]
    reverse_kl: Float[Tensor, " N"]
    forward_kl: Float[Tensor, " N"]
    policy_entropy: Float[Tensor, " N"]
    reference_entropy: Float[Tensor, " N"]
    policy_top: Int[Tensor, " N"]
    reference_top: Int[Tensor, " N"]

    @property
    def count(self) -> int:
        """Number of tokens."""
        return len(self.token)

    def columns(self) -> dict[str, Tensor]:
        """Name the columns, in their order."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def rows(self, chosen: Tensor) -> TokenTable:
        """Take some rows, by number or by mask."""
        return TokenTable(**{name: values[chosen] for name, values in self.columns().items()})

    @classmethod
    def empty(cls) -> TokenTable:
        """Give a table without rows."""
        whole = {"cluster", "response", "position", "token", "policy_top", "reference_top"}
        return cls(
            **{
                field.name: torch.zeros(0, dtype=torch.int64 if field.name in whole else torch.float32)
                for field in fields(cls)
            }
        )

    @classmethod
    def join(cls, tables: Sequence[TokenTable]) -> TokenTable:
        """Put tables one behind another."""
        if not tables:
            return cls.empty()
        columns = [table.columns() for table in tables]
        return cls(**{name: torch.cat([each[name] for each in columns]) for name in columns[0]})
