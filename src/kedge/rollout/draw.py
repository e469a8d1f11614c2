"""One token drawn from each row of logits."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

_BLOCK = 256
"""Tokens whose masses are summed before any running sum is made."""


def draw(
    logits: Float[Tensor, "R V"], uniforms: Float[Tensor, " R"] | None
) -> tuple[Int[Tensor, " R"], Float[Tensor, " R"]]:
    """Draw a token of each row, with its log-probability under softmax(logits), which uses up the logits.

    The token is the first whose cumulative probability reaches 1 − u, with u uniform on [0, 1): one random
    number a row, nothing sorted, and a token of probability zero is never drawn. In a large vocabulary the search
    goes by blocks of tokens first and then inside the block that was found, so that running sums, which are made
    in float64, are short; every token keeps its probability to the relative rounding of the logits' type.

    Args:
        logits: tempered already; −∞ forbids a token.
        uniforms: numbers in [0, 1), float64; ``None`` takes the most probable token.

    Returns:
        Token ids and log-probabilities in nats.

    >>> logits = torch.tensor([[0.0, 0.0, -torch.inf]]).repeat(3, 1)
    >>> draw(logits, torch.tensor([0.0, 0.4, 0.6], dtype=torch.float64))[0]
    tensor([1, 1, 0])
    """
    if uniforms is None:
        tokens = logits.argmax(-1, keepdim=True)
        return tokens[:, 0], logits.log_softmax(-1).gather(1, tokens)[:, 0]
    masses = logits.sub_(logits.amax(-1, keepdim=True)).exp_()  # new memory [R, V] would take longer
    sums = _block_sums(masses) if masses.shape[1] > _BLOCK else masses
    cumulative = sums.cumsum(-1, dtype=torch.float64)
    total = cumulative[:, -1:]
    tokens = _search(masses, sums, cumulative, (1 - uniforms[:, None]) * total)
    log_probs = masses.gather(1, tokens).log_() - total.log().to(masses.dtype)
    return tokens[:, 0], log_probs[:, 0]


def _block_sums(masses: Tensor) -> Tensor:
    """Sum each block; the last one, which may be short or empty, stands for itself."""
    whole = masses.shape[1] // _BLOCK * _BLOCK
    blocks = masses[:, :whole].unflatten(1, (-1, _BLOCK)).sum(-1)
    return torch.cat([blocks, masses[:, whole:].sum(-1, keepdim=True)], dim=1)


def _search(masses: Tensor, sums: Tensor, cumulative: Tensor, sought: Tensor) -> Tensor:
    """Find the first token of each row at which the masses up to and with it reach what is sought, above 0."""
    block = (cumulative < sought).sum(-1, keepdim=True)
    if sums is masses:  # blocks of one token
        return block
    before = torch.where(block > 0, cumulative.gather(1, (block - 1).clamp(min=0)), 0.0)
    share = ((sought - before) / sums.gather(1, block)).clamp(max=1.0)
    columns = block * _BLOCK + torch.arange(_BLOCK, device=masses.device)
    inside = masses.gather(1, columns.clamp(max=masses.shape[1] - 1)).where(columns < masses.shape[1], 0.0)
    running = inside.cumsum(-1, dtype=torch.float64)
    return block * _BLOCK + (running < share * running[:, -1:]).sum(-1, keepdim=True)
