"""Rollouts: responses drawn from the policy, token in and token out."""

from kedge.rollout.engine import Rollout, SamplingConfig, concatenate
from kedge.rollout.inprocess import generate

__all__ = ["Rollout", "SamplingConfig", "concatenate", "generate"]
