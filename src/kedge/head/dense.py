"""The definition of every output of the head: plain tensors, whole logits, gradients by autograd.

It holds several [tokens, vocabulary] matrices. It is here to be read, and to hold the other backends to it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from kedge.divergence import entropy, forward_kl, reverse_kl, total_variation
from kedge.head.request import Request
from kedge.head.types import Head

_DIVERGENCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "reverse_kl": reverse_kl,
    "forward_kl": forward_kl,
    "total_variation": total_variation,
}


def dense_scores(request: Request) -> dict[str, Tensor]:
    """Every wanted output, [N] each, as a function of the whole logits."""
    logits = head_logits(request.hidden, request.head, request.temperature, request.dtype)
    own: dict[str, Callable[[], Tensor]] = {
        "log_prob": lambda: _log_prob(logits, request.targets),
        "entropy": lambda: entropy(logits),
        "log_normalizer": lambda: logits.logsumexp(-1),
    }
    scores = {output: own[output]() for output in request.policy_outputs}
    for name, outputs in request.anchor_outputs.items():
        anchor = request.anchors[name]
        others = head_logits(anchor.hidden, anchor.head, request.temperature, request.dtype)
        for output in outputs:
            if output == "log_prob":
                scores[f"{name}.log_prob"] = _log_prob(others, request.targets)
            else:
                scores[f"{name}.{output}"] = _DIVERGENCES[output](logits, others)
    return {name: scores[name] for name in request.names}


def head_logits(hidden: Tensor, head: Head, temperature: float, dtype: torch.dtype) -> Tensor:
    """The logits [N, V] of a head, in ``dtype``, as ``Head`` defines them."""
    weight = head.weight[: head.vocabulary].to(dtype)
    logits = hidden.to(dtype) @ weight.T
    if head.bias is not None:
        logits = logits + head.bias[: head.vocabulary].to(dtype)
    logits = head.scale * logits
    if head.softcap is not None:
        capped = head.softcap * torch.tanh(logits / head.softcap)
        logits = capped.masked_fill(logits == -math.inf, -math.inf)
    return logits / temperature


def _log_prob(logits: Tensor, targets: Tensor) -> Tensor:
    """The log-probability of the targets; a masked one has −∞, and no gradient."""
    log_prob = logits.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)
    return torch.where(log_prob == -math.inf, -math.inf, log_prob)
