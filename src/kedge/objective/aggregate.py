"""Every masked sum, mean or normaliser over packed response tokens.

Tokens of all responses lie one after the other in tensors of length N; ``lengths`` says how many belong to
each of the R responses. No other part of a loss is divided by a number of tokens or responses.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

Mode = Literal["token_mean", "sequence_mean", "constant"]


def valid_positions(lengths: Int[Tensor, " R"], count: int) -> Bool[Tensor, "R T"]:
    """Return which cells of a padded [R, T] table hold a token, T being the longest length.

    Row-major order of the true cells is the packed order.

    Args:
        lengths: Tokens of each response.
        count: Length N of the packed tensor the lengths must describe.

    Raises:
        ValueError: The lengths are negative or do not sum to ``count``.

    >>> valid_positions(torch.tensor([2, 1]), 3).int().tolist()
    [[1, 1], [1, 0]]
    """
    if lengths.numel() and int(lengths.min()) < 0:
        raise ValueError(f"lengths must not be negative, got {int(lengths.min())}")
    total = int(lengths.sum())
    if total != count:
        raise ValueError(f"lengths sum to {total} tokens, but the packed tensor holds {count}")
    longest = int(lengths.max()) if lengths.numel() else 0
    return torch.arange(longest, device=lengths.device) < lengths[:, None]


def pad(values: Float[Tensor, " N"], valid: Bool[Tensor, "R T"]) -> Float[Tensor, "R T"]:
    """Lay packed values out in a table, one response a row, zeros behind their ends.

    ``table[valid]`` gives the packed values back.

    >>> pad(torch.tensor([1.0, 2.0, 3.0]), valid_positions(torch.tensor([2, 1]), 3)).tolist()
    [[1.0, 2.0], [3.0, 0.0]]
    """
    return values.new_zeros(valid.shape).masked_scatter(valid, values)


def spread(values: Shaped[Tensor, " R"], lengths: Int[Tensor, " R"]) -> Shaped[Tensor, " N"]:
    """Give every token the value of its response.

    >>> spread(torch.tensor([5.0, 7.0]), torch.tensor([2, 1])).tolist()
    [5.0, 5.0, 7.0]
    """
    return torch.repeat_interleave(values, lengths)


def per_response_sum(values: Float[Tensor, " N"], lengths: Int[Tensor, " R"]) -> Float[Tensor, " R"]:
    """Sum packed per-token values over each response: S_i = Σ_{t in i} v_t.

    Args:
        values: Per-token values, in packed order, in any unit.
        lengths: Tokens of each response (may be 0).

    Returns:
        One sum a response, in the unit of ``values``; differentiable.

    Raises:
        ValueError: The lengths do not sum to N.

    >>> per_response_sum(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2, 1])).tolist()
    [3.0, 3.0]
    """
    return pad(values, valid_positions(lengths, values.numel())).sum(dim=1)


def masked_sum(values: Float[Tensor, " N"], mask: Bool[Tensor, " N"]) -> Float[Tensor, ""]:
    """Sum the values where the mask is true; what is masked may be anything, NaN too.

    >>> masked_sum(torch.tensor([1.0, float("nan"), 3.0]), torch.tensor([True, False, True])).item()
    4.0
    """
    return torch.where(mask, values, 0.0).sum()


def masked_mean(values: Float[Tensor, " N"], mask: Bool[Tensor, " N"]) -> Float[Tensor, ""]:
    """Average the values where the mask is true: Σ m·v / Σ m, and 0 where nothing is true.

    >>> masked_mean(torch.tensor([1.0, float("nan"), 3.0]), torch.tensor([True, False, True])).item()
    2.0
    """
    return masked_sum(values, mask) / mask.sum().clamp(min=1)


def aggregation_weights(
    lengths: Int[Tensor, " R"],
    mask: Bool[Tensor, " N"],
    mode: Mode,
    *,
    constant_length: int | None = None,
    total_tokens: int | None = None,
    total_responses: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, " N"]:
    """Return the weight of each token, so that the loss is Σ weight·per_token.

    With m_t the mask, T_i the unmasked tokens of response i, M all unmasked tokens and R all responses::

        token_mean     m_t / M
        sequence_mean  m_t / (T_i R)
        constant       m_t / (C R)        C = constant_length  (Dr. GRPO)

    M and R are counts of the *global* batch: pass them for a micro-batch or on one of several ranks, and the
    losses (and gradients) of the parts sum to that of the whole.

    Args:
        lengths: Tokens of each response.
        mask: Tokens that count, in packed order.
        mode: How tokens are averaged.
        constant_length: C, in tokens; for ``constant`` only.
        total_tokens: M of the global batch; by default that of ``mask``.
        total_responses: R of the global batch, responses without an unmasked token included; by default
            the length of ``lengths``.
        dtype: Of the weights.

    Returns:
        Weights; 0 for masked tokens, all 0 for an empty mask.

    Raises:
        ValueError: Lengths that do not sum to N, a missing, needless or non-positive ``constant_length``,
            or a total of less than what is in ``mask`` and ``lengths``.

    Source: Yu et al. 2025 (DAPO), arXiv 2503.14476; Liu et al. 2025 (Dr. GRPO), arXiv 2503.20783.

    >>> lengths, mask = torch.tensor([2, 1]), torch.tensor([True, True, True])
    >>> aggregation_weights(lengths, mask, "sequence_mean").tolist()
    [0.25, 0.25, 0.5]
    """
    valid = valid_positions(lengths, mask.numel())
    if (constant_length is not None) != (mode == "constant"):
        raise ValueError(f"constant_length goes with mode 'constant', got {constant_length} with {mode!r}")
    if constant_length is not None and constant_length <= 0:
        raise ValueError(f"constant_length must be a positive number of tokens, got {constant_length}")
    present = mask.to(dtype)
    tokens = _total("total_tokens", total_tokens, int(mask.sum()))
    responses = _total("total_responses", total_responses, lengths.numel())
    if mode == "token_mean":
        return present / max(tokens, 1)
    if constant_length is not None:
        return present / (constant_length * max(responses, 1))
    own = pad(present, valid).sum(dim=1).clamp(min=1)
    return present / (spread(own, lengths) * max(responses, 1))


def _total(name: str, given: int | None, here: int) -> int:
    if given is None:
        return here
    if given < here:
        raise ValueError(f"{name} counts the global batch: got {given}, but this part alone has {here}")
    return given
