"""Correction weights by hand."""

from __future__ import annotations

import math

import pytest
import torch

from kedge.objective import Correction, correction_weights

LENGTHS = torch.tensor([2, 3])
OLD = torch.tensor([0.5, 0.5, 0.1, 0.4, 0.2], dtype=torch.float64).log()
SAMPLER = torch.tensor([0.25, 0.5, 0.4, 0.1, 0.4], dtype=torch.float64).log()


@pytest.mark.parametrize(
    ("correction", "expected"),
    [
        (Correction(), [1, 1, 1, 1, 1]),
        (Correction("truncate"), [2, 1, 0.25, 4, 0.5]),
        (Correction("truncate", high=2.0), [2, 1, 0.25, 2, 0.5]),
        (Correction("mask", low=0.5, high=2.0), [2, 1, 0, 0, 0.5]),
        (Correction("truncate", "sequence"), [2, 2, 0.5, 0.5, 0.5]),
        (Correction("truncate", "sequence", high=1.5), [1.5, 1.5, 0.5, 0.5, 0.5]),
        (Correction("mask", "sequence", low=0.6, high=3.0), [2, 2, 0, 0, 0]),
    ],
)
def test_by_hand(correction: Correction, expected: list[float]) -> None:
    old = OLD.clone().requires_grad_()
    weights = correction_weights(old, SAMPLER, LENGTHS, correction)
    assert weights.tolist() == pytest.approx(expected)
    assert not weights.requires_grad


def test_tokens_the_sampler_did_not_draw_count_as_one() -> None:
    mask = torch.tensor([True, True, False, True, True])
    sampler = torch.where(mask, SAMPLER, -math.inf)
    token = correction_weights(OLD, sampler, LENGTHS, Correction("truncate"), mask)
    assert token.tolist() == pytest.approx([2, 1, 1, 4, 0.5])
    sequence = correction_weights(OLD, sampler, LENGTHS, Correction("truncate", "sequence"), mask)
    assert sequence.tolist() == pytest.approx([2, 2, 2, 2, 2])


@pytest.mark.parametrize("bounds", [(-0.1, 2.0), (2.0, 2.0), (math.nan, 2.0)])
def test_bounds_must_leave_room(bounds: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="0 ≤ low < high"):
        Correction("mask", low=bounds[0], high=bounds[1])
