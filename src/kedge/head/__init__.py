"""Log-probability, entropy and exact KL through a head, without the [tokens, vocabulary] matrix."""

from kedge.head.backend import default_chunk_rows
from kedge.head.logits import score_logits
from kedge.head.reduce import reduce
from kedge.head.request import ANCHOR_OUTPUTS, POLICY_OUTPUTS, TOKEN_OUTPUTS
from kedge.head.score import score
from kedge.head.types import Anchor, Head, PerToken

__all__ = [
    "ANCHOR_OUTPUTS",
    "POLICY_OUTPUTS",
    "TOKEN_OUTPUTS",
    "Anchor",
    "Head",
    "PerToken",
    "default_chunk_rows",
    "reduce",
    "score",
    "score_logits",
]
