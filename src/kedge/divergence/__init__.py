"""Divergences between distributions over a vocabulary: exact ones, sampled estimators; tensors only."""

from kedge.divergence.exact import (
    Normalizer,
    cross_entropy,
    entropy,
    forward_kl,
    jensen_shannon,
    log_ratio_of_logits,
    normalizer,
    reverse_kl,
    total_variation,
)
from kedge.divergence.log_probs import (
    FAR,
    cross_entropy_from_log_probs,
    entropy_from_log_probs,
    excess_exponential,
    finite,
    jensen_shannon_from_log_probs,
    kl_from_log_probs,
    probability_difference,
    total_variation_from_log_probs,
)
from kedge.divergence.sampled import ESTIMATORS, LINEAR_BEYOND, k1, k2, k3, token_surrogate
from kedge.divergence.two_outcomes import two_outcome_kl, two_outcome_total_variation

__all__ = [
    "ESTIMATORS",
    "FAR",
    "LINEAR_BEYOND",
    "Normalizer",
    "cross_entropy",
    "cross_entropy_from_log_probs",
    "entropy",
    "entropy_from_log_probs",
    "excess_exponential",
    "finite",
    "forward_kl",
    "jensen_shannon",
    "jensen_shannon_from_log_probs",
    "k1",
    "k2",
    "k3",
    "kl_from_log_probs",
    "log_ratio_of_logits",
    "normalizer",
    "probability_difference",
    "reverse_kl",
    "token_surrogate",
    "total_variation",
    "total_variation_from_log_probs",
    "two_outcome_kl",
    "two_outcome_total_variation",
]
