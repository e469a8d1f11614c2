from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch

from kedge.objective import bradley_terry_loss

DIFFERENCES = [-800.0, -30.0, -3.0, -1e-3, 0.0, 0.5, 4.0, 20.5, 30.0, 90.0]


def closed_form(x: float) -> float:
    """−log σ(x), by whichever form loses no digits at x."""
    return math.log1p(math.exp(-x)) if x > 0 else -x + math.log1p(math.exp(x))


@pytest.mark.parametrize("margin", [0.0, 0.75])
def test_closed_form(margin: float) -> None:
    rejected = torch.linspace(-2, 2, len(DIFFERENCES), dtype=torch.float64)
    chosen = rejected + torch.tensor(DIFFERENCES, dtype=torch.float64)
    found = bradley_terry_loss(chosen, rejected, torch.full_like(chosen, margin) if margin else None)
    expected = [closed_form(float(c - r) - margin) for c, r in zip(chosen, rejected, strict=True)]
    assert found.tolist() == pytest.approx(expected, rel=1e-12, abs=0.0)


def test_small_losses_keep_their_digits_in_float32() -> None:
    """At 30 nats the loss is exp(−30): a formula through log σ or softplus with a threshold gives 0 or 30."""
    scores = torch.tensor(DIFFERENCES[:-1])
    found = bradley_terry_loss(scores, torch.zeros_like(scores))
    expected = [closed_form(float(x)) for x in scores]
    assert found.tolist() == pytest.approx(expected, rel=1e-6)
    assert float(found[-1]) > 0


def test_gradient() -> None:
    chosen = torch.tensor(DIFFERENCES, dtype=torch.float64, requires_grad=True)
    rejected = torch.zeros_like(chosen, requires_grad=True)
    margin = torch.full_like(chosen, 0.25)
    bradley_terry_loss(chosen, rejected, margin).sum().backward()
    expected = -torch.sigmoid(0.25 - chosen.detach())
    assert chosen.grad is not None
    assert rejected.grad is not None
    torch.testing.assert_close(chosen.grad, expected, rtol=1e-12, atol=0.0)
    torch.testing.assert_close(rejected.grad, -expected, rtol=1e-12, atol=0.0)
    assert torch.autograd.gradcheck(bradley_terry_loss, (chosen[2:7], rejected[2:7], margin[2:7]))


def test_the_scores_that_minimise_it_are_the_log_odds() -> None:
    """Of 3 items compared equally often the maximum likelihood scores give back the frequencies."""
    wins = {(0, 1): Fraction(3, 4), (1, 2): Fraction(2, 3), (0, 2): Fraction(6, 7)}
    scores = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [scores], max_iter=200, tolerance_grad=1e-12, tolerance_change=0.0, line_search_fn="strong_wolfe"
    )

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        terms = [
            float(share) * bradley_terry_loss(scores[i, None], scores[j, None])
            + float(1 - share) * bradley_terry_loss(scores[j, None], scores[i, None])
            for (i, j), share in wins.items()
        ]
        total = torch.cat(terms).sum()
        total.backward()
        return total

    optimizer.step(loss)
    best = scores.detach()
    for (i, j), share in wins.items():
        assert float(torch.sigmoid(best[i] - best[j])) == pytest.approx(float(share), abs=1e-8)
