"""The exponential of compiled code, against float64."""

from __future__ import annotations

import math

import torch

from kedge.head.exponential import exponential

SMALLEST = torch.finfo(torch.float32).tiny


def test_it_is_right_to_two_units_in_the_last_place() -> None:
    x = torch.cat(
        [
            torch.linspace(-87.0, 88.0, 2_000_001),
            torch.logspace(-40, 0, 10_001),
            -torch.logspace(-40, 0, 10_001),
        ]
    )
    true = x.double().exp()
    unit = 2.0 ** (true.log2().floor() - 23)
    assert ((exponential(x).double() - true).abs() / unit).max() <= 2.0


def test_far_below_nothing_is_left() -> None:
    x = torch.tensor([-87.01, -88.0, -1e3, -1e20, -torch.finfo(torch.float32).max, -math.inf])
    assert exponential(x).tolist() == [0.0] * 6
    assert exponential(torch.tensor(-86.99)) > SMALLEST


def test_nothing_below_the_maximum_counts_as_more() -> None:
    """``normalizer`` tells the maxima of a row by their exponential, 1."""
    assert exponential(torch.tensor([0.0, -0.0])).tolist() == [1.0, 1.0]
    assert exponential(-torch.logspace(-45, 2, 100_001)).max() <= 1.0


def test_a_nan_stays_one() -> None:
    """Whatever its lowest bits are, which become an exponent's: memory full of ones is a NaN, too."""
    nans = torch.tensor([0x7FC00000, 0x7FC00001, 0x7F800001, -1], dtype=torch.int32).view(torch.float32)
    assert exponential(nans).isnan().all()
