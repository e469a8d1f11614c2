"""Where theory says that an objective comes to rest; nothing of Kedge is used here.

At rest the expected gradient is zero. What it is depends on two things: what a response counts as, its effective
reward h(y), which may depend on the policy itself, and what its anchor pulls towards::

    whole response   π(y) ∝ ρ(y)·exp(h(y)/β)
    each state       π(a|s) ∝ ρ(a|s)·exp(Q(s, a)/β),   Q the mean of h over what follows, no KL in it
    forward          π(a|s) = β·ρ(a|s)/(λ_s − Q(s, a)),  λ_s such that it sums to 1

Each is solved from the leaves to the root; where h depends on the policy, that is repeated until nothing moves.
A distribution over responses is a vector, in the order of the task's.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from kedge.certify.judge.task import Task

EPS = 1e-6
"""What GRPO adds to a group's standard deviation."""

Worth = Callable[[Task, Float[Tensor, " R"]], Float[Tensor, " R"]]
"""The effective reward of each response, given how likely each is."""
Pull = Callable[[Task, Float[Tensor, " R"], float], Float[Tensor, " R"]]
"""How likely each response is at rest, given the effective rewards and β."""


def rest(
    task: Task, beta: float, worth: Worth, pull: Pull, share: Worth | None = None
) -> Float[Tensor, " R"]:
    """Return how likely each response is where the objective comes to rest.

    Args:
        task: The task.
        beta: β.
        worth: The effective reward.
        pull: What the anchor does with it.
        share: Of the anchor in the loss, as a factor on β; 1 if left out.

    Raises:
        ArithmeticError: Nothing to be found that stays where it is.
    """

    def answer(likely: Tensor) -> Tensor:
        factor = 1.0 if share is None else float(share(task, likely))
        return pull(task, worth(task, likely), beta * factor)

    likely = answer(_normalised(_log_reference(task)))
    for _ in range(2000):
        found = answer(likely)
        if float((found - likely).abs().max()) < 1e-13:
            return found
        likely = _normalised(0.7 * likely.log() + 0.3 * found.log())
    raise ArithmeticError("the prediction does not settle")


def optimum(task: Task, beta: float) -> Float[Tensor, " R"]:
    """π* ∝ ρ·exp(r/β): the maximum of E[r] − β KL(π‖ρ)."""
    return whole_response(task, task.rewards, beta)


# --- what the anchor pulls towards ----------------------------------------------------------------------


def whole_response(task: Task, worth: Float[Tensor, " R"], beta: float) -> Float[Tensor, " R"]:
    """The gradient of KL(π‖ρ) between whole responses."""
    return _normalised(_log_reference(task) + worth / beta)


def each_state(task: Task, worth: Float[Tensor, " R"], beta: float) -> Float[Tensor, " R"]:
    """Σ E[∇KL(π‖ρ)]: right in each state, blind to the states that a token leads to."""
    return _from_the_leaves(task, worth, lambda rho, q: _normalised(rho.log() + q / beta))


def forward(task: Task, worth: Float[Tensor, " R"], beta: float) -> Float[Tensor, " R"]:
    """Σ E[∇KL(ρ‖π)]: at rest π·(Q − V) = β·(π − ρ), so that π = β·ρ/(V + β − Q)."""

    def choose(rho: Tensor, q: Tensor) -> Tensor:
        level = (q + beta * rho).max()
        for _ in range(
            100
        ):  # Newton's steps on a falling, convex sum that is at least 1 here: they do not overshoot
            terms = beta * rho / (level - q)
            step = (terms.sum() - 1) / (terms / (level - q)).sum()
            level = level + step
            if float(step) < 1e-15:
                break
        return beta * rho / (level - q)

    return _from_the_leaves(task, worth, choose)


def _from_the_leaves(
    task: Task, worth: Float[Tensor, " R"], choose: Callable[[Tensor, Tensor], Tensor]
) -> Float[Tensor, " R"]:
    number = {response: index for index, response in enumerate(task.responses)}
    likely = torch.zeros(len(number), dtype=torch.float64)

    def value(prefix: tuple[int, ...]) -> tuple[Tensor, list[tuple[int, Tensor]]]:
        """Mean of h from here on, and the probability of each response from here on."""
        if prefix in number:
            return worth[number[prefix]], [(number[prefix], torch.ones((), dtype=torch.float64))]
        state = next(
            s[len(prefix)]
            for r, s in zip(task.responses, task.states, strict=True)
            if r[: len(prefix)] == prefix
        )
        below = [value((*prefix, token)) for token in range(task.reference.shape[1])]
        q = torch.stack([mean for mean, _ in below])
        pi = choose(task.reference[state].softmax(-1), q)
        return (pi * q).sum(), [
            (y, p * chance) for p, (_, ends) in zip(pi, below, strict=True) for y, chance in ends
        ]

    for response, chance in value(())[1]:
        likely[response] = chance
    return likely


# --- what a response counts as --------------------------------------------------------------------------


def reward(task: Task, likely: Float[Tensor, " R"]) -> Float[Tensor, " R"]:
    """r: an advantage whose baseline has not seen the response."""
    return task.rewards


def minus_group_mean(size: int) -> Worth:
    """(1 − 1/G)·r: the mean of the group moves by r/G with the response itself."""
    return lambda task, likely: (1 - 1 / size) * task.rewards


def over_group_std(size: int) -> Worth:
    """E[(r − mean)/(std + ε)] over the G − 1 others of the group."""

    def worth(task: Task, likely: Float[Tensor, " R"]) -> Float[Tensor, " R"]:
        found = torch.zeros_like(likely)
        for others in itertools.combinations_with_replacement(range(len(likely)), size - 1):
            orders = len(set(itertools.permutations(others)))
            chance = orders * likely[list(others)].prod()
            beside = task.rewards[list(others)].expand(len(likely), -1)
            group = torch.cat([task.rewards[:, None], beside], dim=1)
            found += chance * (task.rewards - group.mean(1)) / (group.std(1) + EPS)
        return found

    return worth


def over_length(of: Worth) -> Worth:
    """(h − E[h])/T: each token of a response of length T has a T-th of its advantage."""

    def worth(task: Task, likely: Float[Tensor, " R"]) -> Float[Tensor, " R"]:
        values = of(task, likely)
        return (values - (likely * values).sum()) / task.lengths

    return worth


def over_token_std(task: Task, likely: Float[Tensor, " R"]) -> Float[Tensor, " R"]:
    """r/σ, σ the standard deviation over tokens of r − V(s_t)."""
    states = task.packed[0]
    chances = torch.repeat_interleave(likely, task.lengths)
    rewards = torch.repeat_interleave(task.rewards, task.lengths)
    zeros = torch.zeros(len(task.reference), dtype=torch.float64)
    visits = zeros.index_add(0, states, chances)
    values = zeros.index_add(0, states, chances * rewards) / visits
    advantages = rewards - values[states]
    mean = (chances * advantages).sum() / chances.sum()
    return task.rewards / ((chances * (advantages - mean) ** 2).sum() / chances.sum()).sqrt()


def per_token(task: Task, likely: Float[Tensor, " R"]) -> Float[Tensor, ""]:
    """1/E[T]: the share of an anchor that is averaged over tokens beside a surrogate a response."""
    return 1 / (likely * task.lengths).sum()


def _log_reference(task: Task) -> Float[Tensor, " R"]:
    return task.log_likely(task.reference)


def _normalised(log_weights: Tensor) -> Tensor:
    return log_weights.softmax(-1)
