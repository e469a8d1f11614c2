"""One loss over all tokens, with its gradients made in forward."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from jaxtyping import Float, Int
from torch import Tensor

from kedge.head.dense import dense_scores
from kedge.head.request import make_request
from kedge.head.types import Head, PerToken


def reduce(
    hidden: Float[Tensor, "N H"],
    head: Head,
    targets: Int[Tensor, " N"],
    per_token: PerToken,
    *,
    anchors: Mapping[str, tuple[Tensor, Head]] | None = None,
    want: Collection[str],
    temperature: float = 1.0,
    backend: str = "chunked",
    chunk_rows: int | None = None,
) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, " N"]]]:
    """Sum a loss over tokens."""
    scores = dense_scores(make_request(hidden, head, targets, anchors, want, temperature))
    loss = per_token(scores, slice(0, hidden.shape[0]))
    return loss, {name: values.detach() for name, values in scores.items()}
