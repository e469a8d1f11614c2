"""The critic's loss on both sides of its clip, by hand, with its gradients."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kedge.objective import explained_variance, value_loss

VALUES = [0.1, 0.5, 0.5, -0.5, 0.5, -3.0]
RETURNS = [1.0, 1.0, 0.3, 1.0, -1.0, -1.0]
"""The old value is 0, the clip 0.2: inside; gone towards the return beyond the clip; past it; away; away; past it."""


def double(values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def evaluate(clip: float | None) -> tuple[list[float], list[float]]:
    values = double(VALUES).requires_grad_()
    loss = value_loss(values, torch.zeros_like(values), double(RETURNS), clip=clip)
    (slope,) = torch.autograd.grad(loss.sum(), values)
    return loss.tolist(), slope.tolist()


def test_without_a_clip_it_is_half_the_squared_error() -> None:
    loss, slope = evaluate(None)
    assert loss == pytest.approx([0.405, 0.125, 0.02, 1.125, 1.125, 2.0])
    assert slope == pytest.approx([v - r for v, r in zip(VALUES, RETURNS, strict=True)])


def test_the_clip_takes_the_larger_error_and_its_gradient() -> None:
    loss, slope = evaluate(0.2)
    assert loss == pytest.approx([0.405, 0.32, 0.02, 1.125, 1.125, 2.0])
    assert slope == pytest.approx([-0.9, 0.0, 0.2, -1.5, 1.5, -2.0])


@given(st.floats(-3, 3), st.floats(-3, 3), st.floats(-3, 3), st.floats(0.01, 2))
def test_never_below_the_squared_error(value: float, old: float, target: float, clip: float) -> None:
    args = (double([value]), double([old]), double([target]))
    clipped, plain = value_loss(*args, clip=clip).item(), value_loss(*args, clip=None).item()
    assert clipped >= plain == pytest.approx(0.5 * (value - target) ** 2)
    if abs(value - old) <= clip:
        assert clipped == pytest.approx(plain, abs=1e-12)


def test_only_the_critic_is_moved() -> None:
    values, old, returns = (torch.ones(1, requires_grad=True) for _ in range(3))
    value_loss(values, old, returns, clip=0.2).sum().backward()
    assert old.grad is returns.grad is None


@pytest.mark.parametrize("clip", [0.0, -1.0, math.nan])
def test_a_clip_is_above_zero(clip: float) -> None:
    with pytest.raises(ValueError, match="clip must be above 0"):
        value_loss(*torch.zeros(3, 1), clip=clip)


def test_explained_variance_by_hand() -> None:
    values, returns = [0.0, 1.0, 1.0, 99.0], [0.0, 2.0, 1.0, math.nan]
    mask = torch.tensor([True, True, True, False])
    errors = [r - v for v, r in zip(values[:3], returns[:3], strict=True)]
    expected = 1 - statistics.pvariance(errors) / statistics.pvariance(returns[:3])
    assert explained_variance(double(values), double(returns), mask).item() == pytest.approx(expected)


def test_explained_variance_at_its_marks() -> None:
    returns, mask = double([1.0, 2.0, 4.0]), torch.ones(3, dtype=torch.bool)
    assert explained_variance(returns + 7, returns, mask).item() == pytest.approx(1.0)
    assert explained_variance(torch.full_like(returns, 9.0), returns, mask).item() == pytest.approx(0.0)
    assert explained_variance(-returns, returns, mask).item() == pytest.approx(-3.0)


def test_nothing_to_explain() -> None:
    values = double([1.0, 2.0])
    for returns, mask in (
        ([0.1, 0.1], [True, True]),
        ([1.0, 2.0], [True, False]),
        ([1.0, 2.0], [False, False]),
    ):
        assert math.isnan(explained_variance(values, double(returns), torch.tensor(mask)).item())
