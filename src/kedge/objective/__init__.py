"""The objective of post-training: advantages, trust region, anchor, losses, controllers."""

from kedge.objective.advantages import group_advantages, position_baseline, reward_to_go, whiten
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
    anchor_token_rewards,
    anchor_values,
    caution,
    refusal,
)
from kedge.objective.calibration import brier_score, expected_calibration_error
from kedge.objective.controllers import Adaptive, Budget, Controller, Fixed, HalvingDoubling, Unit
from kedge.objective.correction import Correction, correction_weights
from kedge.objective.divergence_mask import DivergenceMask
from kedge.objective.gae import gae, terminal_rewards
from kedge.objective.policy_loss import PolicyLoss, TokenInputs
from kedge.objective.preference import bradley_terry_loss
from kedge.objective.trust_region import TrustRegion, clip_masks, ratio, surrogate
from kedge.objective.value_loss import explained_variance, value_loss

__all__ = [
    "Adaptive",
    "Anchor",
    "Budget",
    "Controller",
    "Correction",
    "DivergenceMask",
    "Fixed",
    "HalvingDoubling",
    "PolicyLoss",
    "TokenInputs",
    "TrustRegion",
    "Unit",
    "aggregation_weights",
    "anchor_rewards",
    "anchor_term",
    "anchor_to_go",
    "anchor_token_rewards",
    "anchor_values",
    "bradley_terry_loss",
    "brier_score",
    "caution",
    "clip_masks",
    "correction_weights",
    "expected_calibration_error",
    "explained_variance",
    "gae",
    "group_advantages",
    "masked_mean",
    "masked_sum",
    "per_response_sum",
    "position_baseline",
    "ratio",
    "refusal",
    "reward_to_go",
    "surrogate",
    "terminal_rewards",
    "value_loss",
    "whiten",
]
