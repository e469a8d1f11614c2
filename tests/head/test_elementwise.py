"""The parts of the element-wise work that other tests only see through whole outputs."""

from __future__ import annotations

import math

import pytest
import torch

from kedge.head.elementwise import _maximum


@pytest.mark.parametrize("tokens", [*range(1, 18), 63, 64, 65])
def test_the_maximum_is_found_wherever_it_is(tokens: int) -> None:
    logits = torch.full((tokens, tokens), -7.0).fill_diagonal_(2.0)
    assert _maximum(logits).flatten().tolist() == [2.0] * tokens


def test_a_nan_is_the_maximum() -> None:
    """As for torch's own: a row that has one does not pass for a sound one."""
    logits = torch.zeros(9, 9).fill_diagonal_(math.nan)
    assert _maximum(logits).isnan().all()
