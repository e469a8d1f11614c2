"""The objective of post-training: advantages, trust region, anchor, loss, controllers."""

from kedge.objective.advantages import group_advantages, position_baseline, reward_to_go
from kedge.objective.aggregate import (
    aggregation_weights,
    masked_mean,
    masked_sum,
    per_response_sum,
)
from kedge.objective.anchor import (
    Anchor,
    anchor_rewards,
    anchor_term,
    anchor_to_go,
    anchor_values,
    caution,
    refusal,
)
from kedge.objective.calibration import brier_score, expected_calibration_error
from kedge.objective.controllers import Adaptive, Budget, Controller, Fixed, Unit
from kedge.objective.correction import Correction, correction_weights
from kedge.objective.policy_loss import PolicyLoss, TokenInputs
from kedge.objective.preference import bradley_terry_loss
from kedge.objective.trust_region import TrustRegion, clip_masks, ratio, surrogate

__all__ = [
    "Adaptive",
    "Anchor",
    "Budget",
    "Controller",
    "Correction",
    "Fixed",
    "PolicyLoss",
    "TokenInputs",
    "TrustRegion",
    "Unit",
    "aggregation_weights",
    "anchor_rewards",
    "anchor_term",
    "anchor_to_go",
    "anchor_values",
    "bradley_terry_loss",
    "brier_score",
    "caution",
    "clip_masks",
    "correction_weights",
    "expected_calibration_error",
    "group_advantages",
    "masked_mean",
    "masked_sum",
    "per_response_sum",
    "position_baseline",
    "ratio",
    "refusal",
    "reward_to_go",
    "surrogate",
]
