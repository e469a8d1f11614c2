"""The certificate holds, and goes red when a formula is broken."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping

import pytest
import torch
from rich.console import Console
from torch import Tensor

from kedge import certify
from kedge.certify import Claim, print_table
from kedge.certify.anchors import REGIMES, claims_on, describe, expressible
from kedge.certify.surrogates import CASES, claim_on
from kedge.certify.tabular import draw
from kedge.certify.truth import Truth
from kedge.divergence import ESTIMATORS
from kedge.objective import anchor as anchors
from kedge.objective import policy_loss

CPU, DOUBLE = torch.device("cpu"), torch.float64


@pytest.fixture(scope="module")
def claims() -> list[Claim]:
    return certify.run(seeds=(0,))


def both_regimes(name: str, dtype: torch.dtype = DOUBLE) -> Iterator[Claim]:
    """Claim on an anchor on and off policy, on one draw."""
    (anchor,) = (each for each in expressible() if describe(each) == name)
    for regime in REGIMES[1:]:
        yield from claims_on(anchor, regime, [draw(5, dtype)], CPU, dtype)


def names(claims: Iterator[Claim] | list[Claim], *, failed: bool = True) -> set[str]:
    return {claim.name for claim in claims if claim.passed != failed}


def test_every_claim_holds_in_float64(claims: list[Claim]) -> None:
    assert names(claims) == set()
    assert max(claim.error for claim in claims) < 1e-10
    assert {claim.tolerance for claim in claims} == {1e-10}


def test_every_anchor_is_claimed_on_and_off_policy(claims: list[Claim]) -> None:
    for regime in ("anchor, on policy", "anchor, off policy"):
        gradients = [claim for claim in claims if claim.regime == regime and claim.what == "gradient"]
        assert len(gradients) == len({claim.name for claim in gradients}) == len(expressible())


@pytest.mark.parametrize(
    ("name", "regime", "closed_form"),
    [
        ("k1 in loss, published", "anchor, on policy", "0"),
        ("k3 in loss, published", "anchor, on policy", "Σ E[∇KL(ρ‖π)]"),
        ("k3 in reward, token", "anchor, on policy", "Σ E[∇(KL(π‖ρ) − KL(ρ‖π))]"),
        (
            "k3 in reward, published",
            "anchor, one token, on policy",
            "∇KL(π‖ρ) of the response − Σ E[∇KL(ρ‖π)]",
        ),
        ("exact in loss, token", "anchor, on policy", "Σ E[∇KL(π‖ρ)]"),
        ("exact in reward, token", "anchor, on policy", "0"),
        ("exact in loss, sequence", "anchor, off policy", "Σ E_μ[∇KL(π‖ρ)] + Σ E_μ[∇ log π·(KL to go)]"),
    ],
)
def test_what_is_biased_shows_it(claims: list[Claim], name: str, regime: str, closed_form: str) -> None:
    (claim,) = (c for c in claims if (c.name, c.regime, c.what) == (name, regime, "gradient"))
    assert claim.closed_form == closed_form
    assert not claim.exact
    assert claim.distance > 0.05


@pytest.mark.parametrize(
    ("name", "regime"),
    [
        ("exact in loss, sequence", "anchor, on policy"),
        ("k1 in loss, sequence", "anchor, on policy"),
        ("k1 in reward, published", "anchor, on policy"),
        ("k1 in reward, sequence, baseline", "anchor, on policy"),
        ("exact in loss, sequence, prefix weights", "anchor, off policy"),
        ("exact in loss, sequence, prefix weights, baseline", "anchor, off policy"),
        ("k1 in loss, sequence, prefix weights", "anchor, off policy"),
        ("exact in loss, token", "anchor, one token, on policy"),
        ("sequence weights, untruncated", "surrogate, drawn by another sampler"),
        ("leave-one-out", "advantage, groups of 3"),
    ],
)
def test_what_is_exact_is_the_truth(claims: list[Claim], name: str, regime: str) -> None:
    (claim,) = (c for c in claims if (c.name, c.regime, c.what) == (name, regime, "gradient"))
    assert claim.exact
    assert claim.distance < 1e-10


def test_the_values_are_unbiased_but_for_k2(claims: list[Claim]) -> None:
    values = [
        c for c in claims if c.what == "value" and c.regime == "anchor, on policy" and "forward" not in c.name
    ]
    assert {c.name.split()[0] for c in values if c.exact} == {"exact", "k1", "k3"}
    assert {c.name.split()[0] for c in values if not c.exact} == {"k2"}
    assert all(c.distance > 0.01 for c in values if not c.exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_lower_precision_holds_within_its_own_tolerance(dtype: torch.dtype) -> None:
    found = [
        claim
        for name in (
            "exact in loss, sequence, prefix weights",
            "k3 in loss, published",
            "k1 in reward, sequence",
        )
        for claim in both_regimes(name, dtype)
    ]
    assert names(found) == set()
    assert {claim.tolerance for claim in found} == {certify.TOLERANCE[dtype]}
    assert max(claim.error for claim in found) > 1e-9


@pytest.mark.acceptance
@pytest.mark.parametrize("dtype", list(certify.TOLERANCE), ids=str)
def test_every_claim_holds_in_every_dtype(dtype: torch.dtype) -> None:
    assert names(certify.run(dtype=dtype, seeds=range(5))) == set()


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(ValueError, match="float64, float32, float16, bfloat16, not torch"):
        certify.run(dtype=torch.int64)


RIGHT_TO_GO, RIGHT_TERM, RIGHT_RATIO = anchors.reward_to_go, anchors.anchor_term, policy_loss.ratio


def forgotten(log_policy: Tensor, log_reference: Tensor) -> Tensor:
    """Compute k3 without its −1."""
    return (log_reference - log_policy).exp() + log_policy - log_reference


def turned(log_policy: Tensor, log_reference: Tensor) -> Tensor:
    """Compute k3 with its log-ratio the other way round."""
    return (log_policy - log_reference).exp() - 1 - (log_policy - log_reference)


def swapped(anchor: anchors.Anchor, scores: Mapping[str, Tensor]) -> Tensor:
    """Return an estimator with policy and reference swapped."""
    return ESTIMATORS[anchor.measure](scores["reference.log_prob"], scores["log_prob"])


def dropped(values: Tensor, lengths: Tensor, *, inclusive: bool) -> Tensor:
    """Drop what is still to come."""
    return values if inclusive else torch.zeros_like(values)


def counted_twice(values: Tensor, lengths: Tensor, *, inclusive: bool) -> Tensor:
    """Count a token's own KL in what is still to come after it."""
    return RIGHT_TO_GO(values, lengths, inclusive=True)


BREAKS: dict[str, tuple[object, str, object, set[str], set[str]]] = {
    "k3 without its −1": (
        anchors.ESTIMATORS,
        "k3",
        forgotten,
        {"k3 in loss, published"},
        {"k1 in loss, token", "exact in loss, sequence"},
    ),
    "k3 turned": (
        anchors.ESTIMATORS,
        "k3",
        turned,
        {"k3 in loss, published", "k3 in loss, token", "k3 in reward, published", "k3 in reward, token"},
        {"k2 in loss, published", "exact in loss, sequence"},
    ),
    "no reward-to-go": (
        anchors,
        "reward_to_go",
        dropped,
        {"exact in loss, sequence", "k1 in loss, sequence", "k1 in reward, sequence"},
        {"exact in loss, token", "k1 in reward, published"},
    ),
    "own KL in the reward-to-go": (
        anchors,
        "reward_to_go",
        counted_twice,
        {"exact in loss, sequence, prefix weights"},
        {"k1 in loss, sequence", "k1 in reward, sequence"},
    ),
    "policy and reference swapped": (
        anchors,
        "anchor_values",
        swapped,
        {"k3 in loss, published", "k1 in reward, published", "k1 in loss, sequence"},
        {"k2 in loss, published"},
    ),
    "no gradient at all": (
        policy_loss,
        "anchor_term",
        lambda *rest: RIGHT_TERM(*rest).detach(),
        {"exact in loss, token", "exact in loss, sequence", "k3 in loss, published"},
        {"k1 in reward, sequence"},
    ),
    "the wrong sign": (
        policy_loss,
        "anchor_term",
        lambda *rest: -RIGHT_TERM(*rest),
        {"exact in loss, token", "exact in loss, sequence", "k3 in loss, published"},
        {"k1 in reward, sequence"},
    ),
    "no importance weights": (
        policy_loss,
        "ratio",
        lambda log_prob, *rest: RIGHT_RATIO(log_prob, None),
        {"k1 in reward, sequence", "k3 in reward, token"},
        {"exact in loss, token"},
    ),
    "a baseline that sees its own response": (
        anchors,
        "position_baseline",
        lambda to_go, *rest: 0.5 * to_go,
        {"exact in loss, sequence, baseline", "k1 in reward, sequence, baseline"},
        {"exact in loss, sequence"},
    ),
}


@pytest.mark.parametrize("what", list(BREAKS))
def test_the_certificate_goes_red(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    home, name, broken, red, green = BREAKS[what]
    if isinstance(home, dict):
        monkeypatch.setitem(home, name, broken)
    else:
        monkeypatch.setattr(home, name, broken)
    failed = {anchor: not all(claim.passed for claim in both_regimes(anchor)) for anchor in red | green}
    assert {anchor for anchor, is_red in failed.items() if is_red} == red


def test_a_broken_trust_region_goes_red(monkeypatch: pytest.MonkeyPatch) -> None:
    problems = [draw(5, DOUBLE)]
    names = ("none", "clip", "dual clip", "sequence", "cispo")
    cases = {case.name: case for case in CASES if case.off_policy and case.name in names}
    assert len(cases) == 5
    assert all(claim_on(case, problems, CPU, DOUBLE).passed for case in cases.values())
    monkeypatch.setattr(policy_loss, "surrogate", lambda region, w, log_prob, advantages: w * advantages)
    passed = {name for name, case in cases.items() if claim_on(case, problems, CPU, DOUBLE).passed}
    assert passed == {"none"}


def test_a_claim_that_cannot_see_its_bias_fails() -> None:
    one, near = torch.ones(3, dtype=DOUBLE), torch.ones(3, dtype=DOUBLE) * (1 + 1e-7)
    given = ("k3", "on policy", "gradient", "∇KL(ρ‖π)")
    blind = certify.claims.judge(
        *given, [certify.claims.Measurement([near], near, one)], exact=False, dtype=DOUBLE
    )
    assert not blind.passed
    wrong = certify.claims.judge(
        *given, [certify.claims.Measurement([near], near, one)], exact=True, dtype=DOUBLE
    )
    assert not wrong.passed
    nothing = certify.claims.Measurement([one * torch.nan], one, one)
    assert certify.claims.judge(*given, [nothing], exact=True, dtype=DOUBLE).error == float("inf")


def test_truth_knows_the_textbook() -> None:
    problem = draw(4, DOUBLE, length=2)
    truth = Truth(problem, off_policy=False)
    assert truth.responses(truth.log_pi).sum().item() == pytest.approx(1.0)
    assert truth.visits(truth.log_pi).detach()[0].item() == pytest.approx(1.0)
    chain = truth.whole("exact", "reverse").item()
    assert chain == pytest.approx(truth.sequence_kl("reverse").item(), abs=1e-14)
    assert truth.whole("k1", "reverse").item() == pytest.approx(chain, abs=1e-14)
    assert truth.whole("k3", "reverse").item() == pytest.approx(chain, abs=1e-14)
    step, (row, column) = 1e-5, (2, 1)
    moved = []
    for sign in (-1, 1):
        table = problem.policy.clone()
        table[row, column] += sign * step
        moved.append(Truth(certify.tabular.Tabular(table, *list(vars(problem).values())[1:]), False))
    numeric = (moved[1].sequence_kl("reverse") - moved[0].sequence_kl("reverse")).item() / (2 * step)
    slope = truth.gradient(truth.sequence_kl("reverse"))[row, column].item()
    assert slope == pytest.approx(numeric, abs=1e-9)


def test_the_table_shows_every_claim(claims: list[Claim]) -> None:
    text = io.StringIO()
    failed = Claim("k9", "anchor, on policy", "value", "[k9]", False, 0.5, 1e-10, 0.25, False)
    print_table([*claims, failed], Console(file=text, width=160))
    shown = text.getvalue()
    assert "k3 in reward, token" in shown
    assert "Σ E[∇(KL(π‖ρ) − KL(ρ‖π))]" in shown
    assert "[k9]" in shown
    assert "FAILS" in shown
    assert f"{len(claims)} of {len(claims) + 1} claims hold" in shown
