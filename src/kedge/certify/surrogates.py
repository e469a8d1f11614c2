"""Claims on trust regions, advantages, sampler corrections, entropy bonus: everything but the anchor."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from kedge.certify.claims import Claim, Measurement, judge
from kedge.certify.offered import enumerate_groups, offered
from kedge.certify.tabular import Tabular
from kedge.certify.truth import Truth
from kedge.objective import Anchor, Correction, PolicyLoss, TrustRegion
from kedge.objective.advantages import Kind

Coefficient = Callable[[Float[Tensor, "R 1 T"], Float[Tensor, "R R 1"]], Tensor]
"""Multiplier of each token's score, from its ratio w and the advantage A of its response over another."""

WIDE = {"low": 1.0, "high": 1e6}
TIGHT = {"low": 0.1, "high": 0.2}


class Case(NamedTuple):
    """A claim on the expected gradient of the surrogate.

    Args:
        name: What is claimed of.
        text: The closed form.
        region: The trust region.
        coefficient: The closed form: what multiplies ∇ log π of each token.
        off_policy: Whether the loss is told of another policy that drew the tokens.
        correction: For tokens that another policy drew and the loss is not told of.
        exact: Whether this is the policy gradient.
    """

    name: str
    text: str
    region: TrustRegion
    coefficient: Coefficient
    off_policy: bool = False
    correction: Correction | None = None
    exact: bool = False

    @property
    def regime(self) -> str:
        """Who draws the tokens."""
        if self.correction is not None:
            return "surrogate, drawn by another sampler"
        return "surrogate, off policy" if self.off_policy else "surrogate, on policy"


def _mean(w: Tensor) -> Tensor:
    """Return the sequence ratio exp(mean log w)."""
    return w.log().mean(-1, keepdim=True).exp()


def _product(w: Tensor) -> Tensor:
    return w.prod(-1, keepdim=True)


def _clipped(w: Tensor, advantage: Tensor, dual: float = torch.inf) -> Tensor:
    """Return w·A where no bound has taken the gradient away."""
    rising = (advantage > 0) & (w <= 1 + TIGHT["high"])
    falling = (advantage < 0) & (w >= 1 - TIGHT["low"]) & (w <= dual)
    return w * advantage * (rising | falling)


CASES = (
    *(
        Case(region.kind, "∇E[r]", region, lambda w, a: a + 0 * w, exact=True)
        for region in (
            TrustRegion("none"),
            TrustRegion("clip", **TIGHT),
            TrustRegion("sequence", **TIGHT),
            TrustRegion("cispo", **TIGHT),
        )
    ),
    Case("dual clip", "∇E[r]", TrustRegion("clip", **TIGHT, dual=1.5), lambda w, a: a + 0 * w, exact=True),
    Case("none", "Σ E_μ[w A ∇ log π]", TrustRegion("none"), lambda w, a: w * a, off_policy=True),
    *(
        Case(f"{region.kind}, inside bounds", text, region, coefficient, off_policy=True)
        for region, text, coefficient in (
            (TrustRegion("clip", **WIDE), "Σ E_μ[w A ∇ log π]", lambda w, a: w * a),
            (TrustRegion("cispo", **WIDE), "Σ E_μ[w A ∇ log π]", lambda w, a: w * a),
            (TrustRegion("sequence", **WIDE), "Σ E_μ[s A ∇ log π]", lambda w, a: _mean(w) * a),
        )
    ),
    Case(
        "clip",
        "Σ E_μ[w A ∇ log π, unless clipped]",
        TrustRegion("clip", **TIGHT),
        lambda w, a: _clipped(w, a),
        off_policy=True,
    ),
    Case(
        "dual clip",
        "Σ E_μ[w A ∇ log π, unless clipped]",
        TrustRegion("clip", **TIGHT, dual=1.5),
        lambda w, a: _clipped(w, a, dual=1.5),
        off_policy=True,
    ),
    Case(
        "sequence",
        "Σ E_μ[s A ∇ log π, unless clipped]",
        TrustRegion("sequence", **TIGHT),
        lambda w, a: _clipped(_mean(w), a) + 0 * w,
        off_policy=True,
    ),
    Case(
        "cispo",
        "Σ E_μ[clip(w) A ∇ log π]",
        TrustRegion("cispo", **TIGHT),
        lambda w, a: w.clamp(1 - TIGHT["low"], 1 + TIGHT["high"]) * a,
        off_policy=True,
    ),
    Case(
        "sequence weights, untruncated",
        "∇E[r]",
        TrustRegion("none"),
        lambda w, a: _product(w) * a + 0 * w,
        correction=Correction("truncate", "sequence"),
        exact=True,
    ),
    Case(
        "sequence weights, truncated",
        "Σ E_μ[min(W, 2) A ∇ log π]",
        TrustRegion("none"),
        lambda w, a: _product(w).clamp(max=2.0) * a + 0 * w,
        correction=Correction("truncate", "sequence", high=2.0),
    ),
    Case(
        "token weights, untruncated",
        "Σ E_μ[w A ∇ log π]",
        TrustRegion("none"),
        lambda w, a: w * a,
        correction=Correction("truncate", "token"),
    ),
    Case(
        "token weights, masked",
        "Σ E_μ[w A ∇ log π, if 0.5 ≤ w ≤ 2]",
        TrustRegion("none"),
        lambda w, a: w * a * ((w >= 0.5) & (w <= 2.0)),
        correction=Correction("mask", "token", low=0.5, high=2.0),
    ),
)

UNANCHORED = Anchor()


def surrogate_claims(
    draws: dict[int, list[Tabular]], device: torch.device, dtype: torch.dtype
) -> Iterator[Claim]:
    """Claim the expected gradient of each trust region, correction, advantage and of the entropy bonus.

    Args:
        draws: Tabular problems by the length of their responses.
        device: Where Kedge's functions run.
        dtype: Of hidden states and heads.
    """
    for case in CASES:
        yield claim_on(case, draws[3], device, dtype)
    for size in (2, 3):
        yield _advantage("leave_one_out", size, draws[2], device, dtype)
        yield _advantage("mean", size, draws[2], device, dtype)
    yield _entropy(draws[3], device, dtype)


def draw_rewards(problem: Tabular) -> Float[Tensor, " R"]:
    """Draw a reward for each response; entries that any floating-point type represents."""
    generator = torch.Generator().manual_seed(len(problem.tokens))
    return torch.randint(-8, 9, (len(problem.tokens),), generator=generator).double() / 8


def claim_on(case: Case, problems: list[Tabular], device: torch.device, dtype: torch.dtype) -> Claim:
    """Claim the expected gradient of one case."""
    drawn_by_another = case.off_policy or case.correction is not None
    measurements = []
    for problem in problems:
        rewards = draw_rewards(problem)
        truth = Truth(problem, drawn_by_another)
        offers = offered(
            enumerate_groups(problem, device, dtype, off_policy=drawn_by_another),
            PolicyLoss(case.region, UNANCHORED, beta=0.0),
            off_policy=case.off_policy,
            rewards=rewards,
            correction=case.correction,
        )
        w = (truth.along(truth.log_pi) - truth.along(truth.log_mu)).exp().detach()
        advantages = (rewards[:, None] - rewards[None, :])[..., None]
        others = truth.responses(truth.log_mu)[None, :, None]
        coefficient = (others * case.coefficient(w[:, None, :], advantages)).sum(1)
        form = -truth.gradient(truth.scored(coefficient, ratio=False))
        right = -truth.policy_gradient(rewards)
        measurements.append(Measurement([offer.gradient for offer in offers.values()], form, right))
    return judge(case.name, case.regime, "gradient", case.text, measurements, exact=case.exact, dtype=dtype)


def _advantage(
    kind: Kind, size: int, problems: list[Tabular], device: torch.device, dtype: torch.dtype
) -> Claim:
    measurements = []
    for problem in problems:
        rewards = draw_rewards(problem)
        truth = Truth(problem, off_policy=False)
        offers = offered(
            enumerate_groups(problem, device, dtype, off_policy=False, size=size),
            PolicyLoss(TrustRegion("none"), UNANCHORED, beta=0.0),
            off_policy=False,
            rewards=rewards,
            kind=kind,
        )
        right = -truth.policy_gradient(rewards)
        form = right if kind == "leave_one_out" else (1 - 1 / size) * right
        measurements.append(Measurement([offer.gradient for offer in offers.values()], form, right))
    exact = kind == "leave_one_out"
    name, text = ("leave-one-out", "∇E[r]") if exact else ("group mean", f"(1 − 1/{size}) ∇E[r]")
    regime = f"advantage, groups of {size}"
    return judge(name, regime, "gradient", text, measurements, exact=exact, dtype=dtype)


def _entropy(problems: list[Tabular], device: torch.device, dtype: torch.dtype) -> Claim:
    measurements = []
    for problem in problems:
        truth = Truth(problem, off_policy=False)
        loss = PolicyLoss(TrustRegion("none"), UNANCHORED, beta=0.0, entropy_coefficient=0.5)
        experience = enumerate_groups(problem, device, dtype, off_policy=False, size=1)
        offers = offered(experience, loss, off_policy=False)
        entropy = -(truth.log_pi.exp() * truth.log_pi).sum(-1)
        form = truth.gradient(-0.5 * truth.over_states(entropy))
        measurements.append(Measurement([offer.gradient for offer in offers.values()], form, form))
    return judge(
        "entropy bonus", "bonus, on policy", "gradient", "Σ E[∇H(π)]", measurements, exact=True, dtype=dtype
    )
