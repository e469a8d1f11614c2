"""Preferences between two responses: the Bradley–Terry model's loss."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional


def bradley_terry_loss(
    chosen: Float[Tensor, " P"],
    rejected: Float[Tensor, " P"],
    margin: Float[Tensor, " P"] | None = None,
) -> Float[Tensor, " P"]:
    """Return the negative log-likelihood of every preference under scores r.

    The Bradley–Terry model says P(chosen ≻ rejected) = σ(r_chosen − r_rejected), so with Δ the difference::

        loss = −log σ(Δ − margin) = max(−x, 0) + log(1 + exp(−|x|)),   x = Δ − margin

    which neither overflows nor loses a small loss to rounding. Its gradient with respect to Δ is −σ(margin − Δ).
    Adding a constant to all scores changes nothing: they are known up to that constant.

    Args:
        chosen: Score of the preferred response of each pair.
        rejected: Score of the other one.
        margin: By how much the scores should differ before the loss falls below log 2; 0 if left out.

    Returns:
        Nats per pair; differentiable.

    Source: Bradley & Terry 1952; Stiennon et al. 2020, arXiv 2009.01325; the margin: Touvron et al. 2023 (Llama 2),
    arXiv 2307.09288.

    >>> import torch
    >>> loss = bradley_terry_loss(torch.tensor([0.0, 3.0]), torch.tensor([0.0, 0.0]))
    >>> [round(value, 4) for value in loss.tolist()]
    [0.6931, 0.0486]
    """
    difference = chosen - rejected
    return -functional.logsigmoid(difference if margin is None else difference - margin)
