"""Per-token scores of a head, differentiable, for any loss."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from jaxtyping import Float, Int
from torch import Tensor

from kedge.head.backend import chosen_chunks
from kedge.head.chunked import chunked_scores
from kedge.head.dense import dense_scores
from kedge.head.request import make_request, public_name
from kedge.head.types import Head


def score(
    hidden: Float[Tensor, "N H"],
    head: Head,
    targets: Int[Tensor, " N"],
    *,
    anchors: Mapping[str, tuple[Tensor, Head]] | None = None,
    want: Collection[str],
    temperature: float = 1.0,
    backend: str = "auto",
    chunk_rows: int | None = None,
) -> dict[str, Float[Tensor, " N"]]:
    """Score each token through the head, and compare the policy with its anchors over the whole vocabulary.

    With l the logits of the policy π as ``Head`` defines them, and a the target of a row,

        log_prob              log π(a) = l_a − log Σ e^l        NAME.log_prob           log ρ(a)
        entropy               H(π) = −Σ π·log π                 NAME.reverse_kl         KL(π‖ρ)
        log_normalizer        log Σ e^l                         NAME.forward_kl         KL(ρ‖π)
        top_token             argmax π                          NAME.total_variation    ½·Σ |π − ρ|
                                                                NAME.entropy            H(ρ)
                                                                NAME.top_token          argmax ρ

    where ρ is the anchor called NAME. All but the top tokens (of a tie, one) are differentiable in hidden states,
    weight and bias, of the policy and of every anchor whose tensors require it. What is not wanted is not
    computed. The gradient of an infinite value, which only a mask makes, is zero; a weight of 0 does not silence the
    value, because 0·∞ is no number: leave rows whose target is masked out. A mask leaves one entry at least.

    Args:
        hidden: the policy's hidden states that predict the targets, [N, H].
        head: the policy's head.
        targets: the tokens, Int[N].
        anchors: name → hidden states [N, H'] of the same tokens and their head, of the same vocabulary.
        want: names of outputs.
        temperature: all logits, those of the anchors too, are divided by it.
        backend: "chunked" holds the logits of one chunk at a time, and makes them a second time in backward (or, where
            hidden states alone train and few outputs are wanted, their gradients, [N, H] each, in forward);
            "compiled" does the same with its element-wise work fused by torch's compiler, which is faster from
            some ten seconds of work on (the first call of each kind compiles, another temperature is another kind);
            "triton" with kernels for NVIDIA GPUs (float64 inputs run as "chunked");
            "auto" is "triton" on such a device where Triton is installed, "chunked" elsewhere;
            "dense" is the definition, for small sizes.
        chunk_rows: the most rows in a chunk; None follows from the size of the vocabulary.

    Returns:
        For each name in ``want`` a tensor [N], in nats (total variation: between 0 and 1); float64 if any
        input is, else float32; ids of top tokens int64.

    Raises:
        ValueError: for unknown names, sizes or dtypes that do not fit, a temperature not above 0, a backend that the
            device or the installation lacks, and, on CPU, targets that are not in the vocabulary.
        RuntimeError: in backward, if it is to be differentiated again; the dense backend can be.

    Source: Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models", 2024, arXiv 2411.09009, for
    the log-probability without the matrix; the divergences are those of ``kedge.divergence``.

    >>> import torch
    >>> policy, reference = Head(torch.ones(8, 4)), Head(torch.ones(8, 3))
    >>> scores = score(
    ...     torch.zeros(2, 4),
    ...     policy,
    ...     torch.tensor([0, 1]),
    ...     anchors={"reference": (torch.zeros(2, 3), reference)},
    ...     want={"log_prob", "reference.reverse_kl"},
    ... )
    >>> [round(value, 4) for value in scores["log_prob"].tolist()]
    [-2.0794, -2.0794]
    >>> scores["reference.reverse_kl"].tolist()
    [0.0, 0.0]
    """
    request = make_request(hidden, head, targets, anchors, want, temperature)
    chunks = chosen_chunks(backend, chunk_rows, head.tokens, hidden.device)
    scores = dense_scores(request) if chunks is None else chunked_scores(request, *chunks)
    return {public_name(output): values for output, values in scores.items()}
