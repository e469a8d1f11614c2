"""Log-probability, entropy and exact KL of a language model's head, without the [tokens, vocabulary] matrix."""

from kedge.head.reduce import reduce
from kedge.head.request import ANCHOR_OUTPUTS, POLICY_OUTPUTS
from kedge.head.score import score
from kedge.head.types import Anchor, Head, PerToken

__all__ = ["ANCHOR_OUTPUTS", "POLICY_OUTPUTS", "Anchor", "Head", "PerToken", "reduce", "score"]
