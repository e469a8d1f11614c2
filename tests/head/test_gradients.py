"""Every output against finite differences, with respect to every input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kedge.head import ANCHOR_OUTPUTS, POLICY_OUTPUTS, Anchor, Head, score


@pytest.mark.parametrize("output", [*POLICY_OUTPUTS, *(f"reference.{each}" for each in ANCHOR_OUTPUTS)])
def test_gradcheck(output: str, make_case: Callable[..., Any]) -> None:
    inputs = [
        f"{source}.{each}" for source in ("policy", "reference") for each in ("hidden", "weight", "bias")
    ]
    case = make_case(
        rows=3, tokens=5, bias=True, padding=1, softcap=4.0, scale=0.8, temperature=0.9, train=inputs
    )
    assert list(case.trained) == inputs

    def scored(*tensors: Tensor) -> Tensor:
        sources = [
            Anchor(hidden, Head(weight, bias, 0.8, 4.0, 5))
            for hidden, weight, bias in (tensors[:3], tensors[3:])
        ]
        return score(
            *sources[0],
            case.targets,
            anchors={"reference": sources[1]},
            want=[output],
            temperature=0.9,
            chunk_rows=2,
        )[output]

    assert torch.autograd.gradcheck(scored, tuple(case.trained.values()), eps=1e-6, atol=1e-8, rtol=1e-6)
