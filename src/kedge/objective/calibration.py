"""Calibration: whether the probabilities that a model of preferences gives are the frequencies that come true."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def brier_score(probability: Float[Tensor, " P"]) -> float:
    """Return the mean squared error of the probability given to what came true: mean of (1 − p)².

    Args:
        probability: p of each pair, that the chosen response is preferred.

    Returns:
        0 for certainty that is always right, ¼ for p = ½ throughout, 1 for certainty that is always wrong.

    Raises:
        ValueError: There are no pairs.

    Source: Brier 1950.

    >>> brier_score(torch.tensor([1.0, 0.5]))
    0.125
    """
    _require_pairs(probability)
    return float((1.0 - probability.double()).square().mean())


def expected_calibration_error(probability: Float[Tensor, " P"], *, bins: int = 10) -> float:
    """Return how far confidence is from accuracy, in the mean over pairs.

    A model that gives p to the chosen response predicts the more probable one of the two with confidence
    c = max(p, 1 − p), and is right where p > ½ (half right where p = ½). Pairs are sorted by c into bins of equal
    width between ½ and 1::

        ECE = Σ_b n_b / n · |accuracy_b − mean confidence_b|

    Args:
        probability: p of each pair, that the chosen response is preferred.
        bins: Their number.

    Returns:
        0 for a calibrated model, up to 1; with few pairs a bin it is biased upwards, by chance alone.

    Raises:
        ValueError: There are no pairs, or no bins.

    Source: Naeini, Cooper & Hauskrecht 2015; Guo et al. 2017, arXiv 1706.04599.

    >>> round(expected_calibration_error(torch.tensor([0.75, 0.75, 0.75, 0.25])), 6)  # 3 of 4 right, at 75 %
    0.0
    >>> expected_calibration_error(torch.tensor([1.0, 0.0]))  # certain, and right half the time
    0.5
    """
    _require_pairs(probability)
    if bins < 1:
        raise ValueError(f"calibration needs at least one bin, not {bins}")
    p = probability.double()
    confidence = torch.maximum(p, 1.0 - p)
    right = torch.where(p == 0.5, 0.5, (p > 0.5).double())
    place = ((confidence - 0.5) * 2 * bins).long().clamp(0, bins - 1)
    gaps = torch.zeros(bins, dtype=torch.float64, device=p.device).index_add_(0, place, right - confidence)
    return float(gaps.abs().sum() / len(p))


def _require_pairs(probability: Tensor) -> None:
    if probability.numel() == 0:
        raise ValueError("calibration of no pairs is not defined")
