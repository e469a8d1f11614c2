"""One loss over all tokens, whose gradients are made while the logits are at hand."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from jaxtyping import Float, Int
from torch import Tensor

from kedge.head.backend import chosen_chunks
from kedge.head.chunked import chunked_loss
from kedge.head.dense import dense_loss
from kedge.head.request import make_request, public_name
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
    backend: str = "auto",
    chunk_rows: int | None = None,
) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, " N"]]]:
    """Sum a loss over tokens, chunk by chunk, and make its gradients on the way.

        loss = Σ over chunks of per_token(scores of the chunk, rows of the chunk)

    If ``per_token`` is a sum over tokens, value and gradients are those of
    ``per_token(score(…), slice(0, N))``, but no logits are made a second time. What a token's loss has to know
    of other tokens must come in as a constant, to be indexed by ``rows``. The gradients reach the head's inputs
    only, nothing else that ``per_token`` may use; they are handed out once: a second backward through the same
    loss is an error.

    Args:
        hidden: the policy's hidden states that predict the targets, [N, H].
        head: the policy's head.
        targets: the tokens, Int[N].
        per_token: called with the chunk's scores, name → [n], and its rows, a slice of 0…N; gives a scalar.
        anchors: as in ``score``.
        want: names of outputs, as in ``score``.
        temperature: as in ``score``.
        backend: as in ``score``.
        chunk_rows: as in ``score``.

    Returns:
        The loss, a scalar, differentiable; and the scores, name → [N], detached.

    Raises:
        ValueError: as ``score`` does; also if ``per_token`` returns anything but a scalar, or (chunked backends)
            depends on a parameter, or on scores of another chunk.

    Source: Hsu et al., "Liger Kernel", 2024, arXiv 2410.10989, for gradients made in forward.

    >>> import torch
    >>> hidden = torch.zeros(3, 4, requires_grad=True)
    >>> loss, scores = reduce(
    ...     hidden, Head(torch.eye(8, 4)), torch.tensor([0, 1, 2]),
    ...     lambda scores, rows: -scores["log_prob"].sum(), want={"log_prob"},
    ... )
    >>> loss.backward()
    >>> hidden.grad[0].tolist()
    [-0.875, 0.125, 0.125, 0.125]
    """
    request = make_request(hidden, head, targets, anchors, want, temperature)
    chunks = chosen_chunks(backend, chunk_rows, head.tokens, hidden.device)
    loss, scores = (
        dense_loss(request, per_token) if chunks is None else chunked_loss(request, per_token, *chunks)
    )
    return loss, {public_name(output): values for output, values in scores.items()}
