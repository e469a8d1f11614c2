"""How numbers are written for people."""

from __future__ import annotations

import math

MISSING = "–"


def figure(value: int | float | None, decimals: int = 3) -> str:
    """Write a number with a fixed count of decimals, as long as that says something.

    Args:
        value: The number; None and NaN are missing.
        decimals: Decimals of numbers of ordinary size.

    Returns:
        Large numbers in thousands without decimals, small ones that would be all zeros with two significant
        digits, a dash for a missing one.

    >>> [figure(v) for v in (0.76543, -2.0, 0, 12345.6, 2e-5, float("inf"), float("nan"), None)]
    ['0.765', '-2.000', '0', '12,346', '2.0e-05', '∞', '–', '–']
    """
    if value is None or math.isnan(value):
        return MISSING
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        return f"{value:,.0f}" if abs(value) < 1e9 else f"{value:.2e}"
    return f"{value:.{decimals}f}" if abs(value) >= 0.5 * 10**-decimals else f"{value:.1e}"


def count(value: int | float | None) -> str:
    """Write a large count with its unit of thousands.

    >>> [count(v) for v in (None, 54, 650_000, 7_240_000_000)]
    ['–', '54', '650 k', '7.24 B']
    """
    if value is None or math.isnan(value):
        return MISSING
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f}"


def duration(seconds: int | float | None) -> str:
    """Write a time.

    >>> [duration(s) for s in (None, 0.42, 31.6, 184, 7290)]
    ['–', '0.4 s', '32 s', '3 min 4 s', '2 h 1 min']
    """
    if seconds is None or math.isnan(seconds):
        return MISSING
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
