"""Claims on every output of the head: its value in each state, its gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from kedge.certify.claims import Claim, Measurement, judge
from kedge.certify.offered import enumerate_groups
from kedge.certify.tabular import Tabular
from kedge.certify.truth import Truth

REGIME = "head"

DEFINITIONS: dict[str, tuple[str, Callable[[Truth], Tensor]]] = {
    "log_prob": ("log π(a)", lambda truth: truth.log_pi),
    "entropy": ("H(π)", lambda truth: _sum(truth, -truth.log_pi.exp() * truth.log_pi)),
    "log_normalizer": ("log Σ e^logit", lambda truth: _sum(truth, truth.table.exp()).log()),
    "reference.log_prob": ("log ρ(a)", lambda truth: truth.log_rho),
    "reference.reverse_kl": ("KL(π‖ρ)", lambda truth: truth.estimate("exact", "reverse", truth.log_pi)),
    "reference.forward_kl": ("KL(ρ‖π)", lambda truth: truth.estimate("exact", "forward", truth.log_pi)),
    "reference.total_variation": (
        "½ Σ |π − ρ|",
        lambda truth: _sum(truth, (truth.log_pi.exp() - truth.log_rho.exp()).abs()) / 2,
    ),
}
"""Each output's definition, as a table over states and tokens."""


def output_claims(problems: list[Tabular], device: torch.device, dtype: torch.dtype) -> Iterator[Claim]:
    """Claim each output's value at every token and the gradient of a weighted sum of it over all tokens.

    Args:
        problems: Tabular problems.
        device: Where Kedge's functions run.
        dtype: Of hidden states and heads.
    """
    want = frozenset(DEFINITIONS)
    experiences = [enumerate_groups(each, device, dtype, off_policy=False, size=1) for each in problems]
    truths = [Truth(problem, off_policy=False) for problem in problems]
    scores = [each.scores(each.problem.policy, want) for each in experiences]
    for output, (text, definition) in DEFINITIONS.items():
        values, gradients = [], []
        for experience, truth, outputs in zip(experiences, truths, scores, strict=True):
            right = truth.along(definition(truth)).flatten()
            values.append(Measurement([outputs[output].cpu().double()], right.detach(), right.detach()))
            if output == "reference.log_prob":
                continue
            weights = torch.linspace(-1, 1, right.numel(), dtype=torch.float64)
            per_token = _weighted(output, weights.to(device, outputs[output].dtype))
            offers = experience.offers(per_token, frozenset({output}))
            slope = truth.gradient((weights * right).sum())
            gradients.append(Measurement([offer.gradient for offer in offers.values()], slope, slope))
        yield judge(output, REGIME, "value", text, values, exact=True, dtype=dtype)
        if gradients:
            yield judge(output, REGIME, "gradient", f"∇ {text}", gradients, exact=True, dtype=dtype)


def _weighted(output: str, weights: Float[Tensor, " N"]) -> Callable[..., Tensor]:
    return lambda scores, rows: (weights[rows] * scores[output]).sum()


def _sum(truth: Truth, terms: Float[Tensor, "S V"]) -> Float[Tensor, "S V"]:
    return terms.sum(-1, keepdim=True).expand(truth.table.shape)
