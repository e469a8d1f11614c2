"""Claims on a bandit with one state, whose optimum under each anchor is known in closed form."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from kedge.certify.claims import Claim, Measurement, judge
from kedge.certify.judge import predictions as theory
from kedge.certify.judge.groups import all_groups
from kedge.certify.judge.learner import Learner
from kedge.certify.judge.objectives import IN_REWARD, SEQUENCE, Objective
from kedge.certify.judge.task import Task, tree

ACTIONS = 6
UPDATES = 60
RATE = 0.5
"""Each update takes the policy about this part of the way that is left."""

GIBBS = "π = ρ·exp(r/β)/Z"
REFERENCE = Objective("exact KL(π‖ρ) in the loss", GIBBS, theory.optimum, SEQUENCE)
REWARD = Objective("critic, k1 in the reward", GIBBS, theory.optimum, IN_REWARD, advantage="critic")
PENALTY = Objective(
    "penalty KL(old‖π), old policy held", "π = β·μ/(λ − r)", None, SEQUENCE, penalty=1.0, epochs=2 * UPDATES
)


def bandit_claims(device: torch.device, dtype: torch.dtype, seeds: Sequence[int]) -> Iterator[Claim]:
    """Claim that expected gradients arrive at the optimum of E[r] − β KL, the KL to reference or old policy.

    Args:
        device: Where Kedge's functions run.
        dtype: Of hidden states and heads.
        seeds: One draw of the bandit for each.
    """
    tasks = [tree(seed, vocabulary=ACTIONS, longest=1, dtype=dtype) for seed in seeds]
    for objective in (REFERENCE, REWARD, PENALTY):
        evidence = []
        for task in tasks:
            pull = theory.forward if objective is PENALTY else theory.whole_response
            best = pull(task, task.rewards, 1.0)
            evidence.append(Measurement([_arrived(objective, task, device, dtype)], best, best))
        yield judge(objective.name, "bandit", "optimum", objective.ends, evidence, exact=True, dtype=dtype)


def _arrived(
    objective: Objective, task: Task, device: torch.device, dtype: torch.dtype
) -> Float[Tensor, " R"]:
    """Return where the updates lead: each on a batch of its own, but for the penalty, whose old policy is held."""
    held = objective is PENALTY
    learner = Learner(task, objective, 0.0 if held else 1.0, device, dtype)
    groups = all_groups(task, learner.size, device, dtype)
    for _ in range(1 if held else UPDATES):
        learner.step(groups, groups.likely(learner.table), RATE)
    return task.log_likely(learner.table).exp()
