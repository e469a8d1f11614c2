"""All distributions of one call of the head, one chunk of rows at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kedge.divergence import (
    entropy_from_log_probs,
    kl_from_log_probs,
    log_ratio_of_logits,
    total_variation_from_log_probs,
)
from kedge.head.gradients import Comparison, Pull, logit_gradient
from kedge.head.projection import Projection
from kedge.head.request import DIVERGENCES, POLICY, Output, Request


class Workspace:
    """Loads a chunk of rows, scores it, and carries upstream gradients of its scores on to the parameters.

    Args:
        request: what is asked.
        chunk_rows: the most rows in a chunk.
        needs: for each of ``request.tensors()``, whether it needs a gradient.
    """

    def __init__(self, request: Request, chunk_rows: int, needs: Sequence[bool]) -> None:
        self._request = request
        needed = request.by_source(needs)
        self._projections = {
            source: Projection(
                request.sources[source], request.temperature, request.dtype, chunk_rows, needed[source]
            )
            for source in request.involved
        }
        self._rows = slice(0, 0)
        self._targets = request.targets[self._rows]

    def load(self, rows: slice) -> None:
        """Make the logits of a chunk."""
        self._rows, self._targets = rows, self._request.targets[rows]
        for projection in self._projections.values():
            projection.load(rows)

    def scores(self) -> dict[Output, Tensor]:
        """Return every wanted output of the chunk, [n] each."""
        scores = {}
        for source, output in self._request.wanted:
            if output == "log_prob":
                scores[source, output] = self._projections[source].log_prob(self._targets)
            elif output == "log_normalizer":
                scores[source, output] = self._projections[source].log_normalizer()
        elementwise = [output for output in self._request.wanted if output not in scores]
        if elementwise:
            parts = [self._elementwise(block) for block in self._projections[POLICY].blocks()]
            scores |= {output: torch.cat([part[output] for part in parts]) for output in elementwise}
        return scores

    def backward(self, upstream: Mapping[Output, Tensor], scores: Mapping[Output, Tensor]) -> None:
        """Add what these gradients [n] of the chunk's scores give; uses up the chunk's logits."""
        pulls = {output: Pull.of(gradient, scores[output]) for output, gradient in upstream.items()}
        moved = [
            source for source, each in self._projections.items() if each.trains and _pulled(source, pulls)
        ]
        if not moved:
            return
        for block in self._projections[moved[0]].blocks():
            here = {output: pull[block] for output, pull in pulls.items()}
            for source, gradient in self._logit_gradients(block, moved, here).items():
                self._projections[source].put_gradient(block, gradient)
        for source in moved:
            self._projections[source].accumulate(self._rows)

    def gradients(self) -> list[Tensor | None]:
        """Return what has been summed for each of ``request.tensors()``; None where nothing was needed."""
        flat: list[Tensor | None] = []
        for source, tensors in self._request.by_source(self._request.tensors()).items():
            projection = self._projections.get(source)
            flat += projection.gradients() if projection else [None] * len(tensors)
        return flat

    def _elementwise(self, block: slice) -> dict[Output, Tensor]:
        """Return the outputs that are sums over the vocabulary, for a block."""
        log_p = self._projections[POLICY].log_probs(block)
        scores: dict[Output, Tensor] = {}
        if (POLICY, "entropy") in self._request.wanted:
            scores[POLICY, "entropy"] = entropy_from_log_probs(log_p)
        for source in self._projections:
            wanted = [each for each in DIVERGENCES if (source, each) in self._request.wanted]
            if not wanted:
                continue
            log_q = self._projections[source].log_probs(block)
            x = self._log_ratio(source, block)
            if "reverse_kl" in wanted:
                scores[source, "reverse_kl"] = kl_from_log_probs(log_p, log_q, x)
            if "forward_kl" in wanted:
                scores[source, "forward_kl"] = kl_from_log_probs(log_q, log_p, -x)
            if "total_variation" in wanted:
                scores[source, "total_variation"] = total_variation_from_log_probs(log_p, log_q, x)
        return scores

    def _log_ratio(self, source: str, block: slice) -> Tensor:
        policy, other = self._projections[POLICY], self._projections[source]
        return log_ratio_of_logits(*policy.block(block), *other.block(block))

    def _logit_gradients(
        self, block: slice, moved: list[str], pulls: Mapping[Output, Pull]
    ) -> dict[str, Tensor]:
        """Return the gradient of the logits, [n, V], of each source that is moved, for a block."""
        compared = {source for source, output in pulls if output in DIVERGENCES}
        needed = compared.union(moved, {POLICY} if compared else ())
        log_probs = {source: self._projections[source].log_probs(block) for source in needed}
        comparisons = {source: self._compare(source, block, log_probs, pulls) for source in compared}
        gradients = {}
        for source in moved:
            seen = list(comparisons.values())
            if source != POLICY:
                seen = [comparisons[source].reversed()] if source in comparisons else []
            gradients[source] = logit_gradient(
                log_probs[source],
                self._targets[block],
                seen,
                log_prob=pulls.get((source, "log_prob")),
                entropy=pulls.get((source, "entropy")),
                log_normalizer=pulls.get((source, "log_normalizer")),
            )
        return gradients

    def _compare(
        self, source: str, block: slice, log_probs: Mapping[str, Tensor], pulls: Mapping[Output, Pull]
    ) -> Comparison:
        return Comparison(
            log_p=log_probs[POLICY],
            log_q=log_probs[source],
            log_ratio=self._log_ratio(source, block),
            outward=pulls.get((source, "reverse_kl")),
            inward=pulls.get((source, "forward_kl")),
            variation=pulls.get((source, "total_variation")),
        )


def _pulled(source: str, pulls: Mapping[Output, Pull]) -> bool:
    """Whether any of these outputs depends on the logits of a source."""
    return any(of == source or (source == POLICY and output in DIVERGENCES) for of, output in pulls)
