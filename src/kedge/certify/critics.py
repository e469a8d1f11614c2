"""Claims on generalised advantages, with the loss of the critic that they need."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from kedge.certify.claims import Claim, Measurement, judge
from kedge.certify.offered import Experience, enumerate_groups, updated
from kedge.certify.surrogates import UNANCHORED, draw_rewards
from kedge.certify.tabular import Tabular
from kedge.certify.truth import Truth
from kedge.objective import (
    Anchor,
    PolicyLoss,
    TrustRegion,
    anchor_token_rewards,
    gae,
    terminal_rewards,
    value_loss,
)

REGIME = "critic, on policy"
IN_REWARD = Anchor("k1", placement="reward", gradient="published")
BETA = 0.5
CLIP = 0.25


class Case(NamedTuple):
    """A claim on the expected policy gradient from generalised advantages.

    Args:
        name: What is claimed of.
        text: The closed form.
        trace: λ.
        discount: γ.
        right: Whether the critic knows the values, or is off by what comes to hand.
        anchored: Whether every token's reward has −β·k1.
        exact: Whether the expectation is the gradient of E[r] − β KL(π‖ρ).
    """

    name: str
    text: str
    trace: float
    discount: float = 1.0
    right: bool = True
    anchored: bool = False
    exact: bool = True


CASES = (
    Case("GAE, λ = 1", "∇E[r]", 1.0),
    Case("GAE, λ = 1, wrong critic", "∇E[r]", 1.0, right=False),
    Case("GAE, λ = ½", "∇E[r]", 0.5),
    Case("GAE, λ = ½, wrong critic", "Σ E[∇ log π_t Σ_l λ^l δ_{t+l}]", 0.5, right=False, exact=False),
    Case("GAE, λ = 1, γ = ¾", "Σ E[∇ log π_t γ^(T−t) r]", 1.0, discount=0.75, exact=False),
    Case("GAE, λ = 1, k1 in each token's reward", "∇(E[r] − β KL(π‖ρ))", 1.0, anchored=True),
)


def critic_claims(
    draws: dict[int, list[Tabular]], device: torch.device, dtype: torch.dtype
) -> Iterator[Claim]:
    """Claim the advantages themselves, the gradients that they give, and what the critic's loss teaches it.

    Args:
        draws: Tabular problems by the length of their responses.
        device: Where Kedge's functions run.
        dtype: Of hidden states and heads.
    """
    problems = draws[3]
    yield _advantages(problems, device, dtype)
    for case in CASES:
        yield claim_on(case, problems, device, dtype)
    for clip in (None, CLIP):
        yield _value_loss(clip, problems, dtype)


def claim_on(case: Case, problems: list[Tabular], device: torch.device, dtype: torch.dtype) -> Claim:
    """Claim the expected gradient of one case."""
    loss = PolicyLoss(TrustRegion("none"), UNANCHORED, beta=0.0)
    measurements = []
    for problem in problems:
        truth, experience = _enumerated(problem, device, dtype)
        values = _critic(truth, right=case.right)
        advantages = _estimated(case, experience, values)
        offers = updated(experience, loss, advantages, off_policy=False)
        right = -truth.policy_gradient(draw_rewards(problem))
        if case.anchored:
            right = right + BETA * truth.gradient(truth.sequence_kl("reverse"))
        form = (
            right if case.exact else -truth.gradient(truth.scored(_defined(case, truth, values), ratio=False))
        )
        measurements.append(Measurement([offer.gradient for offer in offers.values()], form, right))
    return judge(case.name, REGIME, "gradient", case.text, measurements, exact=case.exact, dtype=dtype)


def _enumerated(problem: Tabular, device: torch.device, dtype: torch.dtype) -> tuple[Truth, Experience]:
    return Truth(problem, False), enumerate_groups(problem, device, dtype, off_policy=False, size=1)


def _critic(truth: Truth, *, right: bool) -> Float[Tensor, " S"]:
    """Return the values of the states, or what a critic might believe that never saw them."""
    values = truth.values(draw_rewards(truth.problem))
    return values if right else values + torch.linspace(-1, 1, len(values), dtype=torch.float64).cos().flip(0)


def _estimated(case: Case, experience: Experience, values: Float[Tensor, " S"]) -> Float[Tensor, " N"]:
    """Return Kedge's advantages of all tokens."""
    problem, lengths = experience.problem, experience.lengths
    want = frozenset({"log_prob"}) | (IN_REWARD.outputs if case.anchored else frozenset())
    scored = experience.scores(problem.policy, want)
    real = scored["log_prob"].dtype
    given = draw_rewards(problem).to(experience.device, real)[experience.drawn]
    rewards = terminal_rewards(given, lengths)
    if case.anchored:
        mask = torch.ones_like(experience.targets, dtype=torch.bool)
        rewards = rewards + anchor_token_rewards(IN_REWARD, BETA, scored, mask)
    states = problem.states.to(experience.device)[experience.drawn].flatten()
    known = values.to(experience.device, real)[states]
    return gae(rewards, known, lengths, discount=case.discount, trace=case.trace)


def _defined(case: Case, truth: Truth, values: Float[Tensor, " S"]) -> Float[Tensor, "R T"]:
    """Σ_l (γλ)^l δ_{t+l} of each token of each response, written out."""
    known = torch.cat([values[truth.problem.states], torch.zeros(len(truth.problem.tokens), 1)], dim=1)
    surprise = case.discount * known[:, 1:] - known[:, :-1]
    surprise[:, -1] += draw_rewards(truth.problem)
    shrink = case.discount * case.trace
    length = truth.problem.length
    return torch.stack(
        [sum(shrink ** (u - t) * surprise[:, u] for u in range(t, length)) for t in range(length)],  # type: ignore[misc]
        dim=-1,
    )


def _advantages(problems: list[Tabular], device: torch.device, dtype: torch.dtype) -> Claim:
    """Claim that with λ = 1 and exact values the advantage is the reward-to-go minus the value."""
    measurements = []
    for problem in problems:
        truth, experience = _enumerated(problem, device, dtype)
        values = _critic(truth, right=True)
        found = _estimated(CASES[0], experience, values).cpu().double().reshape(problem.states.shape)
        right = draw_rewards(problem)[:, None] - values[problem.states]
        measurements.append(Measurement([found], right, right))
    return judge(CASES[0].name, REGIME, "value", "reward to go − V", measurements, exact=True, dtype=dtype)


def _value_loss(clip: float | None, problems: list[Tabular], dtype: torch.dtype) -> Claim:
    """Claim what the critic's loss teaches it, by the gradient with respect to its value of each state.

    Without a clip that is m(s)·(V(s) − E[r | s]), m being how often the state is visited: 0 where the critic is right.
    """
    measurements = []
    for problem in problems:
        truth = Truth(problem, False)
        wide = torch.promote_types(dtype, torch.float32)
        rewards = draw_rewards(problem)[:, None].expand(problem.states.shape)
        old = _critic(truth, right=False)
        table = (
            (old + 0.5 * torch.linspace(0, 12, len(old), dtype=torch.float64).sin()).to(wide).requires_grad_()
        )
        likely = truth.responses(truth.log_pi).detach()[:, None]
        losses = value_loss(
            table[problem.states].flatten(),
            old.to(wide)[problem.states].flatten(),
            rewards.flatten().to(wide),
            clip=clip,
        )
        (found,) = torch.autograd.grad((likely.to(wide) * losses.reshape(rewards.shape)).sum(), table)
        form = _pull(truth, table.detach().double(), old, clip)
        measurements.append(
            Measurement([found.double()], form, _pull(truth, table.detach().double(), old, None))
        )
    name, text = (
        ("value loss", "m(s) (V − E[r])")
        if clip is None
        else ("value loss, clipped", "the same, unless clipped")
    )
    return judge(name, REGIME, "gradient", text, measurements, exact=clip is None, dtype=dtype)


def _pull(truth: Truth, values: Tensor, old: Tensor, clip: float | None) -> Float[Tensor, " S"]:
    """Σ over responses through each state of their probability times V − r, unless the clip has let go of it."""
    states, rewards = truth.problem.states, draw_rewards(truth.problem)[:, None]
    error, moved = values[states] - rewards, (values - old)[states]
    pull = truth.responses(truth.log_pi).detach()[:, None] * error
    if clip is not None:
        held = old[states] + moved.sign() * clip - rewards
        pull = torch.where((moved.abs() > clip) & (held.abs() > error.abs()), 0.0, pull)
    return pull.new_zeros(len(values)).index_add(0, states.flatten(), pull.flatten())
