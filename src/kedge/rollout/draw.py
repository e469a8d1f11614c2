"""One token drawn from each row of logits."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor


def draw(
    logits: Float[Tensor, "R V"], uniforms: Float[Tensor, " R"] | None
) -> tuple[Int[Tensor, " R"], Float[Tensor, " R"]]:
    """Draw a token of each row, with its log-probability under softmax(logits).

    The token is the first whose cumulative probability, added up in float64, reaches (1 − u) · total, with u
    uniform on [0, 1): one random number a row, nothing sorted, and a token of probability zero is never drawn.

    Args:
        logits: tempered already; −∞ forbids a token.
        uniforms: numbers in [0, 1), float64; ``None`` takes the most probable token.

    Returns:
        Token ids and log-probabilities in nats.

    >>> import torch
    >>> logits = torch.tensor([[0.0, 0.0, -torch.inf]]).expand(3, 3)
    >>> draw(logits, torch.tensor([0.0, 0.4, 0.6], dtype=torch.float64))[0]
    tensor([1, 1, 0])
    """
    log_probs = logits.log_softmax(-1)
    if uniforms is None:
        tokens = log_probs.argmax(-1, keepdim=True)
    else:
        cumulative = log_probs.exp().cumsum(-1, dtype=uniforms.dtype)
        tokens = (cumulative < (1 - uniforms[:, None]) * cumulative[:, -1:]).sum(-1, keepdim=True)
    return tokens[:, 0], log_probs.gather(1, tokens)[:, 0]
