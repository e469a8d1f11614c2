"""The exponential of compiled code on a CPU: one expression, where torch's compiler would call a library's function.

The call costs more than the arithmetic: it empties all vector registers, at each of five exponentials in a pair of
logits. ``kedge.head.compiler`` puts the expression in the function's place.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LOG2_E = 1.4426950408889634
_LOG_2_HIGH, _LOG_2_LOW = 0.693145751953125, 1.4286068203094173e-06
"""log 2 in two parts; the first has 16 bits, so that a small whole number times it is exact."""
_WHOLE = 1.5 * 2.0**23
"""Added to a float32, it leaves the nearest whole number in the lowest bits."""
_POLYNOMIAL = (
    0.0013814540176801306,
    0.00836874510894259,
    0.04166839078354791,
    0.1666652039904253,
    0.4999999343212929,
)
"""q with e^r ≈ 1 + r + r²·q(r), to 3e-9 of e^r for |r| ≤ ½·log 2 (Remez' exchange), highest power first."""


def exponential(x: Tensor) -> Tensor:
    """Return eˣ of float32 numbers up to 88, within two units in the last place; 0 below −87.

        x = n·log 2 + r,    eˣ = 2ⁿ·(1 + r + r²·q(r))

    Args:
        x: any shape; a NaN stays one.

    Returns:
        eˣ, in float32; exactly 1 at 0, and never more below it.

    Source: Muller, "Elementary Functions: Algorithms and Implementation", 2016, for the reduction in two steps.

    >>> exponential(torch.tensor([0.0, -1.0, -1e20])).tolist()
    [1.0, 0.3678794503211975, 0.0]
    """
    shifted = x * _LOG2_E + _WHOLE
    n = shifted - _WHOLE
    r = (x - n * _LOG_2_HIGH) - n * _LOG_2_LOW
    power = torch.full_like(r, _POLYNOMIAL[0])
    for coefficient in (*_POLYNOMIAL[1:], 1.0, 1.0):
        power = power * r + coefficient
    scale = ((shifted.view(torch.int32) + 127) << 23).view(torch.float32)  # 2ⁿ, by the bits of its exponent
    return torch.where(x < -87.0, 0.0, power * scale)
