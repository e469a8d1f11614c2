"""Per-token scores of a head, differentiable, for any loss."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from jaxtyping import Float, Int
from torch import Tensor

from kedge.head.dense import dense_scores
from kedge.head.request import make_request
from kedge.head.types import Head


def score(
    hidden: Float[Tensor, "N H"],
    head: Head,
    targets: Int[Tensor, " N"],
    *,
    anchors: Mapping[str, tuple[Tensor, Head]] | None = None,
    want: Collection[str],
    temperature: float = 1.0,
    backend: str = "chunked",
    chunk_rows: int | None = None,
) -> dict[str, Float[Tensor, " N"]]:
    """Score each token through the head."""
    return dense_scores(make_request(hidden, head, targets, anchors, want, temperature))
