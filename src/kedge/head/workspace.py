"""All distributions of one call of the head, one chunk of rows at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from operator import itemgetter

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from kedge.head.elementwise import Normalizers, Plan, Transform
from kedge.head.gradients import Pull
from kedge.head.projection import Projection
from kedge.head.request import POLICY, Output, Request, moves
from kedge.head.runner import Runner

_Found = tuple[Normalizers, dict[Output, Tensor]]


class Workspace:
    """Loads a chunk of rows, scores it, and carries upstream gradients of its scores on to the parameters.

    Matrix products run over whole chunks, where they are fast. What is element-wise runs over a few rows of a
    chunk at a time, so that one pass after another finds the same numbers in the cache.

    Args:
        request: what is asked.
        chunk_rows: the most rows in a chunk.
        needs: for each of ``request.tensors()``, whether it needs a gradient.
        runner: how the element-wise work is run.
    """

    def __init__(self, request: Request, chunk_rows: int, needs: Sequence[bool], runner: Runner) -> None:
        self._request, self._runner = request, runner
        needed = request.by_source(needs)
        self._projections = {
            source: Projection(request.sources[source], request.dtype, chunk_rows, needed[source])
            for source in request.involved
        }
        heads = {source: request.sources[source].head for source in request.involved}
        self._transforms = tuple(
            (source, Transform(head.scale, head.softcap, request.temperature))
            for source, head in heads.items()
        )
        self._rows = slice(0, 0)
        self._normalizers: Normalizers = {}

    def load(self, rows: slice, wanted: tuple[Output, ...]) -> dict[Output, Tensor]:
        """Make the logits of a chunk; return the outputs wanted, [n] each."""
        self._rows = rows
        for projection in self._projections.values():
            projection.load(rows)
        plan, targets = Plan(self._transforms, wanted), self._request.targets[rows]
        biases = {source: projection.bias for source, projection in self._projections.items()}
        blocks = self._blocks()
        found = (self._runner.forward(plan, self._logits(block), biases, targets[block]) for block in blocks)
        self._normalizers, scores = _joined(found, blocks)
        return scores

    def backward(self, upstream: Mapping[Output, Tensor], scores: Mapping[Output, Tensor]) -> None:
        """Add what these gradients [n] of the chunk's scores give; uses up the chunk's logits."""
        moved = tuple(
            source
            for source, each in self._projections.items()
            if each.trains and any(moves(output, source) for output in upstream)
        )
        if not moved:
            return
        pulls = {output: Pull.of(gradient, scores[output]) for output, gradient in upstream.items()}
        plan, targets = Plan(self._transforms, (), moved), self._request.targets[self._rows]
        places = {source: self._projections[source].apart(self._rows) for source in moved}
        for block in self._blocks():
            here = {output: pull[block] for output, pull in pulls.items()}
            normalizers = tree_map(itemgetter(block), self._normalizers)
            apart = {source: place[block] for source, place in places.items() if place is not None}
            self._runner.backward(plan, self._logits(block), normalizers, targets[block], here, apart)
        for source in moved:
            self._projections[source].accumulate(self._rows, put_apart=places[source] is not None)

    def hidden_gradients(self, scores: Mapping[Output, Tensor]) -> Iterator[tuple[Output, Tensor]]:
        """Give the gradient [n, H] of each of these scores [n] in the policy's hidden states; uses up the logits."""
        policy = self._projections[POLICY]
        logits = policy.logits.clone() if len(scores) > 1 else policy.logits
        for number, (output, values) in enumerate(scores.items()):
            if number > 0:
                policy.logits.copy_(logits)
            self.backward({output: torch.ones_like(values)}, {output: values})
            yield output, policy.hidden_gradient(self._rows)

    def gradients(self) -> list[Tensor | None]:
        """Return what has been summed for each of ``request.tensors()``; None where nothing was needed."""
        flat: list[Tensor | None] = []
        for source, tensors in self._request.by_source(self._request.tensors()).items():
            projection = self._projections.get(source)
            flat += projection.gradients() if projection else [None] * len(tensors)
        return flat

    def _logits(self, block: slice) -> dict[str, Tensor]:
        return {source: projection.logits[block] for source, projection in self._projections.items()}

    def _blocks(self) -> list[slice]:
        for projection in self._projections.values():
            return self._runner.blocks(projection.logits)
        return []


def _joined(parts: Iterator[_Found], blocks: Sequence[slice]) -> _Found:
    """Put what was found for each block of rows into tensors of the whole chunk, one after the other.

    A few bytes kept from every block would lie between the large intermediates that are freed, and the allocator of
    a CPU would not find room in the gaps: memory would grow with the number of blocks.
    """
    first = next(parts, ({}, {}))
    if len(blocks) <= 1:
        return first
    whole: _Found = tree_map(lambda part: part.new_empty((blocks[-1].stop, *part.shape[1:])), first)
    for block, found in zip(blocks, chain([first], parts), strict=True):
        tree_map(lambda target, part, block=block: target[block].copy_(part), whole, found)
    return whole
