"""The definition of every output of the head: plain tensors, whole logits, gradients by autograd.

It holds several [tokens, vocabulary] matrices. It is here to be read, and to hold the other backends to it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from kedge.divergence import entropy, forward_kl, reverse_kl, total_variation
from kedge.head.request import POLICY, Output, Request, checked_loss, public_name
from kedge.head.types import Anchor, PerToken

_DIVERGENCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "reverse_kl": reverse_kl,
    "forward_kl": forward_kl,
    "total_variation": total_variation,
}


def dense_scores(request: Request) -> dict[Output, Tensor]:
    """Return every wanted output, [N] each, as a differentiable function of whole logits."""
    logits = {
        source: head_logits(request.sources[source], request.temperature, request.dtype)
        for source in request.involved
    }
    scores = {}
    for source, output in request.wanted:
        if output == "log_prob":
            value = _log_prob(logits[source], request.targets)
        elif output == "entropy":
            value = entropy(logits[source])
        elif output == "top_token":
            value = logits[source].argmax(-1)
        elif output == "log_normalizer":
            value = logits[source].logsumexp(-1)
        else:
            value = _DIVERGENCES[output](logits[POLICY], logits[source])
        scores[source, output] = value
    return scores


def dense_loss(request: Request, per_token: PerToken) -> tuple[Tensor, dict[Output, Tensor]]:
    """Return the loss of all tokens at once, differentiable, and every wanted output, [N] each, detached."""
    scores = dense_scores(request)
    named = {public_name(output): values for output, values in scores.items()}
    loss = checked_loss(per_token(named, slice(0, request.targets.shape[0])))
    return loss, {output: values.detach() for output, values in scores.items()}


def head_logits(source: Anchor, temperature: float, dtype: torch.dtype) -> Tensor:
    """Return the logits [N, V] as ``Head`` defines them, in ``dtype``."""
    hidden, head = source
    with torch.autocast(hidden.device.type, enabled=False):  # it would round them to half precision
        logits = hidden.to(dtype) @ head.weight[: head.tokens].to(dtype).T
    if head.bias is not None:
        logits = logits + head.bias[: head.tokens].to(dtype)
    logits = head.scale * logits
    if head.softcap is not None:
        capped = head.softcap * torch.tanh(logits / head.softcap)
        logits = capped.masked_fill(logits == -math.inf, -math.inf)
    return logits / temperature


def _log_prob(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the log-probability of the targets, [N]; that of a masked one is −∞, without a gradient."""
    log_prob = logits.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)
    return torch.where(log_prob == -math.inf, -math.inf, log_prob)
