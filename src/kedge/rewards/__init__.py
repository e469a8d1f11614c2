"""Rewards: found by name, run safely, weighted and summed."""

from kedge.rewards.failure import RewardError, RewardTimeoutError
from kedge.rewards.load import load_reward
from kedge.rewards.score import RewardResult, RewardSet, WeightedReward

__all__ = ["RewardError", "RewardResult", "RewardSet", "RewardTimeoutError", "WeightedReward", "load_reward"]
