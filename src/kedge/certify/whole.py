"""The outputs of the head by their definition, from whole logits, with the gradients of their sums."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kedge.certify.near import Near
from kedge.divergence import entropy, forward_kl, reverse_kl

DEFINITIONS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "log_prob": lambda policy, _, targets: _log_prob(policy, targets),
    "entropy": lambda policy, *_: entropy(policy),
    "reference.reverse_kl": lambda policy, reference, _: reverse_kl(policy, reference),
    "reference.forward_kl": lambda policy, reference, _: forward_kl(policy, reference),
}
"""Each output from the policy's logits, the reference's, and the targets."""

ROWS_AT_ONCE = 4


class Result(NamedTuple):
    """An output [N], with the gradients of its sum over rows.

    Args:
        value: Nats.
        hidden: With respect to the policy's hidden states, [N, H].
        weight: With respect to its head, [V, H].
    """

    value: Float[Tensor, " N"]
    hidden: Float[Tensor, "N H"]
    weight: Float[Tensor, "V H"]


def whole_results(near: Near, dtype: torch.dtype, *, rounded: bool = False) -> dict[str, Result]:
    """Compute every output and its gradients from whole logits; a few rows at a time, to be quick.

    Args:
        near: Policy and reference; upcast to ``dtype``, which changes no number of theirs.
        dtype: Of all that is computed. float64 is the truth.
        rounded: Whether the logits are rounded to bfloat16 first, as a product in bfloat16 rounds them.
    """
    hidden, weight = near.hidden.to(dtype), near.weight.to(dtype)
    reference, reference_weight = near.reference.to(dtype), near.reference_weight.to(dtype)
    values = {output: hidden.new_empty(len(hidden)) for output in DEFINITIONS}
    slopes = {output: hidden.new_empty(len(hidden), len(weight)) for output in DEFINITIONS}
    for start in range(0, len(hidden), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        policy, anchor = hidden[rows] @ weight.T, reference[rows] @ reference_weight.T
        if rounded:
            policy, anchor = policy.bfloat16().to(dtype), anchor.bfloat16().to(dtype)
        policy.requires_grad_()
        for output, definition in DEFINITIONS.items():
            value = definition(policy, anchor, near.targets[rows])
            values[output][rows] = value.detach()
            (slopes[output][rows],) = torch.autograd.grad(value.sum(), policy)
    return {
        output: Result(values[output], slope @ weight, slope.T @ hidden) for output, slope in slopes.items()
    }


def _log_prob(logits: Float[Tensor, "N V"], targets: Int[Tensor, " N"]) -> Float[Tensor, " N"]:
    return logits.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)
