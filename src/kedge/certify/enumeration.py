"""The certificate: every value and expected gradient that Kedge offers, against enumeration."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kedge.certify.anchors import anchor_claims
from kedge.certify.claims import TOLERANCE, Claim
from kedge.certify.critics import critic_claims
from kedge.certify.judge import bandit_claims
from kedge.certify.old_policy import old_policy_claims
from kedge.certify.outputs import output_claims
from kedge.certify.surrogates import surrogate_claims
from kedge.certify.tabular import draw

SEEDS = (0, 1, 2)


def run(
    device: str | torch.device = "cpu", dtype: torch.dtype = torch.float64, *, seeds: Sequence[int] = SEEDS
) -> list[Claim]:
    """Certify this installation: hold every claim against a tabular policy whose responses are enumerated.

    The values and gradients come from the functions that training calls (`kedge.head.score`,
    `kedge.head.reduce`, `kedge.objective.PolicyLoss`) on ``device``, for hidden states and heads of ``dtype``;
    what they should be is computed in float64 on the CPU from the same tables, without Kedge. The expectation
    over all groups of responses is one weighted batch.

    Args:
        device: Such as "cpu" or "cuda".
        dtype: float64, float32, float16 or bfloat16; the tolerance is ``TOLERANCE[dtype]``.
        seeds: One draw of the tables for each.

    Returns:
        The claims, those that failed too: see `Claim.passed`.

    Raises:
        ValueError: A dtype for which no tolerance is stated.

    Source: the gradients of Schulman's estimators, joschu.net/blog/kl-approx.html; the per-state sum of exact
    KLs, Amini, Vieira, Cotterell 2025, arXiv 2504.10637.

    In half a minute (the tests do the same):

    >>> all(claim.passed for claim in run(seeds=[0]))  # doctest: +SKIP
    True
    """
    if dtype not in TOLERANCE:
        stated = ", ".join(str(each).removeprefix("torch.") for each in TOLERANCE)
        raise ValueError(f"the certificate knows the dtypes {stated}, not {dtype}")
    where = torch.device(device)
    draws = {length: [draw(seed, dtype, length=length) for seed in seeds] for length in (1, 2, 3)}
    return [
        *output_claims(draws[3], where, dtype),
        *anchor_claims(draws, where, dtype),
        *surrogate_claims(draws, where, dtype),
        *old_policy_claims(draws, where, dtype),
        *critic_claims(draws, where, dtype),
        *bandit_claims(where, dtype, seeds[:1]),
    ]
