"""The typed tree that a recipe is validated against.

Every field states its unit. A field acts or is refused: what means nothing is rejected here, with the reason.
"""

from kedge.training.config.critic import CriticConfig, GaeConfig
from kedge.training.config.experience import RewardConfig, RewardsConfig, RolloutConfig
from kedge.training.config.inputs import (
    BuildConfig,
    ExamplesConfig,
    ModelConfig,
    PromptsConfig,
    ReferenceConfig,
    TokenizerConfig,
)
from kedge.training.config.objective import (
    AdaptiveConfig,
    AdvantageConfig,
    AnchorConfig,
    BudgetConfig,
    PenaltyConfig,
    TrustRegionConfig,
)
from kedge.training.config.recipe import Recipe, Stage
from kedge.training.config.reward_model import PairsConfig, RewardEvaluationConfig, RewardStage
from kedge.training.config.stages import (
    EvaluationConfig,
    GrpoStage,
    PolicyStage,
    PpoStage,
    SftEvaluationConfig,
    SftStage,
)
from kedge.training.config.updates import CheckpointConfig, ComputeConfig, OptimizerConfig

__all__ = [
    "AdaptiveConfig",
    "AdvantageConfig",
    "AnchorConfig",
    "BudgetConfig",
    "BuildConfig",
    "CheckpointConfig",
    "ComputeConfig",
    "CriticConfig",
    "EvaluationConfig",
    "ExamplesConfig",
    "GaeConfig",
    "GrpoStage",
    "ModelConfig",
    "OptimizerConfig",
    "PairsConfig",
    "PenaltyConfig",
    "PolicyStage",
    "PpoStage",
    "PromptsConfig",
    "Recipe",
    "ReferenceConfig",
    "RewardConfig",
    "RewardEvaluationConfig",
    "RewardStage",
    "RewardsConfig",
    "RolloutConfig",
    "SftEvaluationConfig",
    "SftStage",
    "Stage",
    "TokenizerConfig",
    "TrustRegionConfig",
]
