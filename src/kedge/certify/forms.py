"""What theory says of each anchor: its expected gradient and value in closed form."""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from kedge.certify.truth import Truth
from kedge.objective import Anchor

RESPONSE = {"reverse": "∇KL(π‖ρ) of the response", "forward": "∇ Σ E[KL(ρ‖π)]"}
STATE = {"reverse": "Σ E[∇KL(π‖ρ)]", "forward": "Σ E[∇KL(ρ‖π)]"}


class Form(NamedTuple):
    """A closed form: its text, what it gives on a problem, whether that is the response KL's own."""

    text: str
    value: Tensor
    exact: bool


def gradient_form(truth: Truth, anchor: Anchor) -> Form:
    """Return the expected gradient of the anchor's part of the loss, at β = 1.

    Args:
        truth: The problem, on or off policy.
        anchor: Any anchor with a formula, refused ones too.
    """
    if truth.off_policy and anchor.weights == "none":
        text, potential = _off_policy(truth, anchor)
        return Form(text, truth.gradient(potential), False)
    truth = Truth(truth.problem, off_policy=False)
    text, potential = _on_policy(truth, anchor)
    return Form(text, truth.gradient(potential), _is_exact(anchor, truth.problem.length))


def value_form(truth: Truth, anchor: Anchor) -> Form:
    """Return the expected value of the anchor's part of the loss, at β = 1; arguments as above."""
    measure, direction = anchor.measure, anchor.direction
    if truth.off_policy and anchor.weights == "none":
        log_pi = truth.log_pi
        expected = (truth.log_mu.exp() * truth.estimate(measure, direction, log_pi)).sum(-1)
        return Form(f"Σ E_μ[{measure}]", truth.over_states(expected).detach(), False)
    if direction == "reverse" and measure != "k2":
        return Form("KL(π‖ρ) of the response", truth.sequence_kl("reverse").detach(), True)
    exact = direction == "forward" and truth.problem.length == 1
    return Form(f"Σ E[{_name(anchor)}]", truth.whole(measure, direction).detach(), exact)


def _is_exact(anchor: Anchor, length: int) -> bool:
    """Whether the closed form is the gradient of the KL between whole responses (on policy, or weighted)."""
    whole = anchor.gradient == "sequence" or (anchor.placement == "reward" and anchor.gradient == "published")
    if anchor.direction == "forward":
        return length == 1 and anchor.placement == "loss"
    if whole and (anchor.measure == "k1" or (anchor.measure == "exact" and anchor.placement == "loss")):
        return True
    if length > 1:
        return False
    if anchor.placement == "reward":
        return anchor.measure == "k1"
    return anchor.gradient == "token" or (
        anchor.measure in ("exact", "k2") and anchor.gradient == "published"
    )


def _on_policy(truth: Truth, anchor: Anchor) -> tuple[str, Tensor]:
    measure, direction = anchor.measure, anchor.direction
    own = truth.over_states(truth.drift(measure, direction))
    if anchor.placement == "loss" and (anchor.gradient == "published" or anchor.exact):
        if anchor.gradient == "sequence":
            return RESPONSE[direction], truth.whole(measure, direction)
        texts = {"k1": "0", "k2": STATE["reverse"], "k3": STATE["forward"], "exact": STATE[direction]}
        return texts[measure], own
    if anchor.gradient == "token" and anchor.placement == "loss":
        return STATE["reverse"], truth.over_states(truth.per_state("exact"))
    if anchor.gradient == "token":
        texts = {
            "k1": STATE["reverse"],
            "k2": "Σ E[∇(E[L²]/2 − KL(π‖ρ))]",
            "k3": "Σ E[∇(KL(π‖ρ) − KL(ρ‖π))]",
            "exact": "0",
        }
        return texts[measure], truth.over_states(truth.per_state(measure, direction)) - own
    texts = {
        "k1": RESPONSE["reverse"],
        "k2": "∇ Σ E[k2] − Σ E[∇KL(π‖ρ)]",
        "k3": f"{RESPONSE['reverse']} − {STATE['forward']}",
        "exact": f"{RESPONSE[direction]} − {STATE[direction]}",
    }
    return texts[measure], truth.whole(measure, direction) - own


def _off_policy(truth: Truth, anchor: Anchor) -> tuple[str, Tensor]:
    measure, direction = anchor.measure, anchor.direction
    present = truth.estimate(measure, direction, truth.log_pi)
    if anchor.placement == "reward":
        return _off_policy_reward(truth, anchor, present)
    if anchor.gradient == "token" and not anchor.exact:
        return "Σ E_μ[∇KL(π‖ρ)]", truth.over_states(truth.per_state("exact"))
    own = truth.over_states((truth.log_mu.exp() * present).sum(-1))
    if anchor.gradient != "sequence":
        return f"Σ E_μ[∇{_name(anchor)}]", own
    to_go = truth.to_go(truth.along(present), inclusive=not anchor.exact)
    if anchor.baseline:
        to_go = to_go - truth.mean_by_position(to_go)
    name = "KL to go" if anchor.exact else f"{measure} to go"
    scored = truth.scored(to_go, ratio=False)
    text = f"Σ E_μ[∇ log π·({name}{' − b' if anchor.baseline else ''})]"
    return (f"Σ E_μ[∇{_name(anchor)}] + {text}", own + scored) if anchor.exact else (text, scored)


def _off_policy_reward(truth: Truth, anchor: Anchor, present: Float[Tensor, "S V"]) -> tuple[str, Tensor]:
    """In the reward, the trust region's ratio w weighs each token."""
    measure, direction = anchor.measure, anchor.direction
    if anchor.gradient == "token":
        kept = truth.per_state(measure, direction) - truth.drift(measure, direction)
        return f"Σ E_μ[w {measure} ∇ log π]", truth.over_states(kept)
    table = present if anchor.gradient == "sequence" else truth.estimate(measure, direction, truth.log_mu)
    to_go = truth.to_go(truth.along(table), inclusive=True)
    whose = "" if anchor.gradient == "sequence" else " of μ"
    return f"Σ E_μ[w ∇ log π·({measure}{whose} to go)]", truth.scored(to_go, ratio=True)


def _name(anchor: Anchor) -> str:
    if not anchor.exact:
        return anchor.measure
    return "KL(π‖ρ)" if anchor.direction == "reverse" else "KL(ρ‖π)"
