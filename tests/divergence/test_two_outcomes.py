"""Two outcomes against all of them: the definition, the bound, the last digits."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kedge.divergence import (
    kl_from_log_probs,
    total_variation_from_log_probs,
    two_outcome_kl,
    two_outcome_total_variation,
)

INF = math.inf
LOGITS = st.lists(st.tuples(st.floats(-4, 4), st.floats(-4, 4)), min_size=2, max_size=6)


def double(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(("p", "q"), [(0.5, 0.25), (0.9, 0.1), (0.01, 0.99), (0.3, 0.3), (1e-9, 2e-9)])
def test_the_textbook(p: float, q: float) -> None:
    expected = p * math.log(p / q) + (1 - p) * (math.log1p(-p) - math.log1p(-q))
    found = two_outcome_kl(double(p).log(), double(q).log()).item()
    assert found == pytest.approx(expected, abs=1e-15)
    assert two_outcome_total_variation(double(p).log(), double(q).log()).item() == pytest.approx(abs(p - q))


@given(LOGITS)
def test_at_most_what_the_vocabulary_says(logits: list[tuple[float, float]]) -> None:
    """Merging outcomes brings distributions closer (data processing); with two there is nothing to merge."""
    log_p, log_q = (double(*each).log_softmax(-1) for each in zip(*logits, strict=True))
    kl, tv = two_outcome_kl(log_p, log_q), two_outcome_total_variation(log_p, log_q)
    most_kl, most_tv = kl_from_log_probs(log_p, log_q), total_variation_from_log_probs(log_p, log_q)
    assert (kl >= 0).all()
    assert (kl <= most_kl * (1 + 1e-6) + 1e-12).all()
    assert (tv <= most_tv * (1 + 1e-6) + 1e-12).all()
    if len(logits) == 2:
        assert kl.tolist() == pytest.approx([most_kl.item()] * 2, rel=1e-6, abs=1e-12)
        assert tv.tolist() == pytest.approx([most_tv.item()] * 2, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("p", [1e-6, 0.3, 1 - 2**-10])
def test_a_small_step_keeps_its_digits_in_float32(p: float) -> None:
    """Pinsker's expansion KL ≈ (p − q)²/(2p(1 − p)); the textbook's sum is lost in float32's rounding."""
    log_p = torch.tensor([p]).log()
    log_q = log_p + 1e-5 * min(1.0, (1 - p) / p)
    exact_p, exact_q = log_p.double(), log_q.double()
    expected = two_outcome_kl(exact_p, exact_q).item()
    small, large = Fraction(exact_p.exp().item()), Fraction(exact_q.exp().item())
    assert expected == pytest.approx(float((large - small) ** 2 / (2 * small * (1 - small))), rel=1e-3, abs=0)
    assert two_outcome_kl(log_p, log_q).item() == pytest.approx(expected, rel=1e-4, abs=0)
    assert two_outcome_total_variation(log_p, log_q).item() == pytest.approx(
        abs(exact_p.exp() - exact_q.exp()).item(), rel=1e-4, abs=0
    )


def test_the_ends() -> None:
    log_p = torch.tensor([0.0, 0.0, -INF, -1.0, -1.0, -INF, 1e-7])
    log_q = torch.tensor([0.0, -2.0, -3.0, 0.0, -INF, -INF, 0.0])
    kl, tv = two_outcome_kl(log_p, log_q), two_outcome_total_variation(log_p, log_q)
    rest = -math.log1p(-math.exp(-3))
    assert kl.tolist() == pytest.approx([0, 2, rest, INF, INF, 0, 0], rel=1e-6)
    assert tv.tolist() == pytest.approx(
        [0, 1 - math.exp(-2), math.exp(-3), 1 - math.exp(-1), math.exp(-1), 0, 0], rel=1e-6
    )


def test_detached_and_float32_at_least() -> None:
    half = torch.tensor([-1.0]).bfloat16().requires_grad_()
    for measure in (two_outcome_kl, two_outcome_total_variation):
        found = measure(half, half)
        assert found.dtype == torch.float32
        assert not found.requires_grad
        assert found.item() == 0
