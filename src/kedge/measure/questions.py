"""The three questions that a comparison can answer, with what each estimates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Side = Literal["policy", "reference"]


@dataclass(frozen=True)
class Question:
    """A way of choosing the tokens that two models are compared on.

    Attributes:
        name: in files.
        title: for people.
        estimates: what the figures of this question stand for.
        cluster: what is drawn independently: a prompt or a text.
        sampled_from: whose responses are scored; None for given texts.
        headline: the figures that answer it, the ones that ``--fail-above`` looks at.
    """

    name: str
    title: str
    estimates: str
    cluster: Literal["prompt", "text"]
    sampled_from: Side | None
    headline: tuple[str, ...]


POLICY_RESPONSES = Question(
    name="policy_responses",
    title="responses sampled from the policy",
    estimates=(
        "KL(policy‖reference), the reverse KL. Per response: the exact per-token KLs summed along responses of the "
        "policy, unbiased for the KL of whole responses up to the length limit. Per token: the sum over all response "
        "tokens divided by their number. The forward KL here is exact at each token, but along the policy's "
        "responses it does not estimate the KL(reference‖policy) of whole responses."
    ),
    cluster="prompt",
    sampled_from="policy",
    headline=("reverse_kl",),
)

REFERENCE_RESPONSES = Question(
    name="reference_responses",
    title="responses sampled from the reference",
    estimates=(
        "KL(reference‖policy), the forward KL. Per response: the exact per-token KLs summed along responses of the "
        "reference, unbiased for the KL of whole responses up to the length limit. Per token: the sum over all "
        "response tokens divided by their number. The reverse KL here is exact at each token, but along the "
        "reference's responses it does not estimate the KL(policy‖reference) of whole responses."
    ),
    cluster="prompt",
    sampled_from="reference",
    headline=("forward_kl",),
)

TEXTS = Question(
    name="texts",
    title="given texts",
    estimates=(
        "Mean KL per token, both ways, at the states that the texts visit (teacher forcing), each exact over the "
        "vocabulary. What quantisation studies report is forward_kl, KL(reference‖policy). It says nothing about the "
        "responses that either model would write."
    ),
    cluster="text",
    sampled_from=None,
    headline=("reverse_kl", "forward_kl"),
)

QUESTIONS = {question.name: question for question in (POLICY_RESPONSES, REFERENCE_RESPONSES, TEXTS)}
