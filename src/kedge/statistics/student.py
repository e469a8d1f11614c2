"""Quantiles of Student's t-distribution, from its closed form for whole degrees of freedom."""

from __future__ import annotations

import math


def student_quantile(probability: float, degrees: int) -> float:
    """Give the t that a Student variable stays below with some probability.

    The distribution function is a finite sum for whole degrees of freedom; it is inverted by bisection.

    Args:
        probability: between 0 and 1.
        degrees: of freedom, 1 or more.

    Raises:
        ValueError: for a probability or degrees outside that.

    Source: Abramowitz, Stegun, "Handbook of Mathematical Functions", 1964, 26.7.3 and 26.7.4.

    >>> [round(student_quantile(0.975, degrees), 3) for degrees in (1, 2, 7, 1000)]
    [12.706, 4.303, 2.365, 1.962]
    """
    if not 0 < probability < 1 or degrees < 1:
        raise ValueError(
            f"probability = {probability} must be between 0 and 1, degrees = {degrees} at least 1"
        )
    if probability < 0.5:
        return -student_quantile(1 - probability, degrees)
    low, high = 0.0, 1.0
    while _central(high, degrees) < 2 * probability - 1:
        low, high = high, 2 * high
    while high - low > 1e-12 * high:
        middle = 0.5 * (low + high)
        if _central(middle, degrees) < 2 * probability - 1:
            low = middle
        else:
            high = middle
    return 0.5 * (low + high)


def _central(t: float, degrees: int) -> float:
    """P(|T| < t)."""
    angle = math.atan2(t, math.sqrt(degrees))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = degrees % 2
    term, total = (cosine, 0.0) if odd else (1.0, 1.0)
    if odd and degrees > 1:
        total = term
    for k in range(3 if odd else 2, degrees - 1, 2):
        term *= cosine**2 * (k - 1) / k
        total += term
    return (2 / math.pi) * (angle + sine * total) if odd else sine * total
