"""Claims on what holds the policy to the old one: the exact penalty, the masks by measured divergence."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kedge.certify.claims import Claim, Measurement, judge
from kedge.certify.offered import Offer, enumerate_groups, offered
from kedge.certify.surrogates import UNANCHORED, draw_rewards
from kedge.certify.tabular import Tabular
from kedge.certify.truth import Truth
from kedge.objective import DivergenceMask, PolicyLoss, TrustRegion

PENALTY = PolicyLoss(TrustRegion("none"), UNANCHORED, beta=0.0, penalty=1.0)
THRESHOLDS = {"tv": 0.1, "kl": 0.05}
MASKS = tuple(
    DivergenceMask(measure, THRESHOLDS[measure], level, form)  # type: ignore[arg-type]
    for measure, level, form in itertools.product(
        ("tv", "kl"), ("token", "response"), ("exact", "two_outcome")
    )
)
REGIMES = {False: "old policy, on policy", True: "old policy, off policy"}


def old_policy_claims(
    draws: dict[int, list[Tabular]], device: torch.device, dtype: torch.dtype
) -> Iterator[Claim]:
    """Claim the penalty's value and gradient, then the gradient that each mask leaves, on and off policy.

    Args:
        draws: Tabular problems by the length of their responses.
        device: Where Kedge's functions run.
        dtype: Of hidden states and heads.
    """
    for off_policy in (False, True):
        for mask in MASKS:
            yield mask_claim(mask, draws[2], device, dtype, off_policy=off_policy)
        yield _with_surrogate(draws[2], device, dtype, off_policy=off_policy)
    yield from penalty_claims(draws[3], device, dtype)


def penalty_claims(problems: list[Tabular], device: torch.device, dtype: torch.dtype) -> Iterator[Claim]:
    """Claim that the penalty is KL(old‖policy) of whole responses, in value and gradient.

    The old policy drew the states, so that how often each is visited does not depend on the policy: the sum of the
    tokens' gradients is the response's.
    """
    truths = [Truth(problem, off_policy=True) for problem in problems]
    offers = [
        offered(enumerate_groups(problem, device, dtype, off_policy=True, size=1), PENALTY, off_policy=True)
        for problem in problems
    ]
    wanted = [_response_kl(truth) for truth in truths]
    slopes = [truth.gradient(kl) for truth, kl in zip(truths, wanted, strict=True)]
    for what, forms, text in (
        ("value", [kl.detach() for kl in wanted], "KL(μ‖π) of the response"),
        ("gradient", slopes, "∇KL(μ‖π) of the response"),
    ):
        evidence = [
            Measurement([getattr(offer, what) for offer in ways.values()], form, form)
            for ways, form in zip(offers, forms, strict=True)
        ]
        yield judge("penalty", REGIMES[True], what, text, evidence, exact=True, dtype=dtype)


def mask_claim(
    mask: DivergenceMask,
    problems: list[Tabular],
    device: torch.device,
    dtype: torch.dtype,
    *,
    off_policy: bool,
) -> Claim:
    """Claim the expected gradient of an unclipped surrogate under a mask: on policy nothing is masked."""
    loss = PolicyLoss(TrustRegion("none"), UNANCHORED, beta=0.0, mask=mask)
    measurements = []
    for problem in problems:
        truth, rewards, offers = _offers(problem, loss, device, dtype, off_policy=off_policy)
        form = -truth.gradient(truth.scored(_masked_coefficient(mask, truth, rewards), ratio=False))
        right = -truth.policy_gradient(rewards)
        measurements.append(Measurement([offer.gradient for offer in offers.values()], form, right))
    name = f"mask of {mask.level}s by {mask.measure}{', two outcomes' if mask.form == 'two_outcome' else ''}"
    text = "Σ E_μ[w A ∇ log π, unless masked]" if off_policy else "∇E[r]"
    regime = REGIMES[off_policy]
    return judge(name, regime, "gradient", text, measurements, exact=not off_policy, dtype=dtype)


def _with_surrogate(
    problems: list[Tabular], device: torch.device, dtype: torch.dtype, *, off_policy: bool
) -> Claim:
    """Claim the gradient of surrogate and penalty together; on policy the penalty adds none."""
    measurements = []
    for problem in problems:
        truth, rewards, offers = _offers(problem, PENALTY, device, dtype, off_policy=off_policy)
        unmasked = _coefficient(truth, rewards)
        form = truth.gradient(_response_kl(truth) - truth.scored(unmasked.sum(1), ratio=False))
        right = -truth.policy_gradient(rewards)
        measurements.append(Measurement([offer.gradient for offer in offers.values()], form, right))
    text = "Σ E_μ[w A ∇ log π] − ∇KL(μ‖π)" if off_policy else "∇E[r]"
    regime = REGIMES[off_policy]
    return judge(
        "surrogate and penalty", regime, "gradient", text, measurements, exact=not off_policy, dtype=dtype
    )


def _offers(
    problem: Tabular, loss: PolicyLoss, device: torch.device, dtype: torch.dtype, *, off_policy: bool
) -> tuple[Truth, Tensor, dict[str, Offer]]:
    rewards = draw_rewards(problem)
    experience = enumerate_groups(problem, device, dtype, off_policy=off_policy)
    offers = offered(experience, loss, off_policy=off_policy, rewards=rewards)
    return Truth(problem, off_policy), rewards, offers


def _response_kl(truth: Truth) -> Tensor:
    """KL(μ‖π) between the distributions of whole responses, by its definition."""
    log_mu, log_pi = truth.along(truth.log_mu).sum(-1), truth.along(truth.log_pi).sum(-1)
    return (log_mu.exp() * (log_mu - log_pi)).sum()


def _coefficient(truth: Truth, rewards: Tensor) -> Float[Tensor, "R R T"]:
    """What multiplies ∇ log π of each token of a response, for each response beside it, weighted by the latter."""
    w = (truth.along(truth.log_pi) - truth.along(truth.log_mu)).exp().detach()
    advantages = rewards[:, None] - rewards[None, :]
    return truth.responses(truth.log_mu)[None, :, None] * w[:, None, :] * advantages[..., None]


def _masked_coefficient(mask: DivergenceMask, truth: Truth, rewards: Tensor) -> Float[Tensor, "R T"]:
    coefficient = _coefficient(truth, rewards)
    far = truth.along(_divergence(mask, truth)) > mask.threshold
    if mask.level == "response":
        return (coefficient * ~far.any(-1)[:, None, None]).sum(1)
    return (coefficient * ~(far[:, None, :] & _going_on(truth, coefficient))).sum(1)


def _going_on(truth: Truth, coefficient: Tensor) -> Bool[Tensor, "R R T"]:
    """Whether the update takes the token's probability further from where the old policy had it."""
    further = (truth.along(truth.log_pi) - truth.along(truth.log_mu)).detach()[:, None, :]
    return ((coefficient > 0) & (further > 0)) | ((coefficient < 0) & (further < 0))


def _divergence(mask: DivergenceMask, truth: Truth) -> Float[Tensor, "S V"]:
    """Divergence of μ and π in each state, after each token, by the textbook's sums."""
    p, q = truth.log_mu.exp(), truth.log_pi.detach().exp()
    if mask.form == "two_outcome":
        if mask.measure == "tv":
            return (p - q).abs()
        return p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    terms = 0.5 * (p - q).abs() if mask.measure == "tv" else p * (p / q).log()
    return terms.sum(-1, keepdim=True).expand(p.shape)
