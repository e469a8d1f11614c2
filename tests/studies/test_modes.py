"""The two-peaked target: the fits are the minima that theory says they are."""

from __future__ import annotations

import math

import pytest
import torch

from kedge.divergence import forward_kl, reverse_kl
from studies.modes import FEATURES, PEAKS, PLACES, Student, fitted, least_reverse, same_moments, target


def test_the_forward_fit_has_the_target_s_moments_and_no_neighbour_is_closer() -> None:
    best = same_moments()
    p, q = best.softmax(0), target().softmax(0)
    torch.testing.assert_close(p @ FEATURES, q @ FEATURES, rtol=1e-12, atol=1e-12)
    for nudge in 0.01 * torch.randn(20, 2, dtype=torch.float64):
        assert forward_kl(best + FEATURES @ nudge, target()) > forward_kl(best, target())


@pytest.mark.parametrize(("mass", "place"), PEAKS)
def test_a_reverse_fit_is_one_peak_at_about_the_logarithm_of_its_mass(mass: float, place: float) -> None:
    best = least_reverse(place)
    for nudge in 0.01 * torch.randn(20, 2, dtype=torch.float64):
        assert reverse_kl(best + FEATURES @ nudge, target()) > reverse_kl(best, target())
    fit = fitted("", best)
    assert fit.mean == pytest.approx(place, abs=0.02)
    assert fit.reverse == pytest.approx(-math.log(mass), abs=0.01)


def test_the_target_holds_its_masses() -> None:
    found = target().softmax(0)
    assert float(found[PLACES < 0.2].sum()) == pytest.approx(PEAKS[0][0], abs=0.005)


def test_training_moves_the_student_towards_the_closed_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("studies.modes.STEPS", 300)
    trained = fitted("", Student(0.0, 2.0).train("reference.forward_kl"))
    best = fitted("", same_moments())
    assert trained.forward == pytest.approx(best.forward, abs=0.01)
    assert trained.mean == pytest.approx(best.mean, abs=0.05)
