"""What a caller asks of the head, checked."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TypeVar

import torch
from torch import Tensor

from kedge.head.sharded import gathered, refuse_sharded
from kedge.head.types import Anchor, Head

POLICY = "policy"
DIVERGENCES = ("reverse_kl", "forward_kl", "total_variation")
POLICY_OUTPUTS = ("log_prob", "entropy", "log_normalizer")
ANCHOR_OUTPUTS = ("log_prob", "entropy", *DIVERGENCES)
TOKEN_OUTPUTS = ("top_token",)
"""Outputs of every source that are token ids: nothing flows back through them."""

T = TypeVar("T")
Output = tuple[str, str]
"""A source, which is POLICY or the name of an anchor, and what is wanted of it."""


@dataclass(frozen=True, eq=False)
class Request:
    """A checked call of the head.

    Args:
        sources: hidden states and head of the policy, under POLICY, then of each anchor, under its name.
        wanted: the outputs, in a fixed order.
        targets: the tokens whose log-probability is meant, Int64[N].
        temperature: every logit is divided by it.
        dtype: of logits and scores.
    """

    sources: dict[str, Anchor]
    wanted: tuple[Output, ...]
    targets: Tensor
    temperature: float
    dtype: torch.dtype

    @property
    def involved(self) -> list[str]:
        """The sources whose logits are needed."""
        of_policy = {POLICY for _, output in self.wanted if output in DIVERGENCES}
        needed = of_policy.union(source for source, _ in self.wanted)
        return [source for source in self.sources if source in needed]

    def tensors(self) -> list[Tensor]:
        """Return the hidden states, the weight and, if there is one, the bias of each source in turn."""
        return [tensor for source in self.sources.values() for tensor in source_tensors(source)]

    def by_source(self, values: Sequence[T]) -> dict[str, list[T]]:
        """Sort by source what stands in the order of ``tensors()``."""
        rest = iter(values)
        return {
            name: list(islice(rest, len(source_tensors(source)))) for name, source in self.sources.items()
        }

    def with_tensors(self, tensors: Sequence[Tensor]) -> Request:
        """Return the same request of other tensors, which stand in the order of ``tensors()``."""
        sources = {}
        for name, (hidden, weight, *bias) in self.by_source(tensors).items():
            head = replace(self.sources[name].head, weight=weight, bias=bias[0] if bias else None)
            sources[name] = Anchor(hidden, head)
        return replace(self, sources=sources)


def source_tensors(source: Anchor) -> list[Tensor]:
    """Return the hidden states, the weight and, if there is one, the bias."""
    hidden, head = source
    return [hidden, head.weight] if head.bias is None else [hidden, head.weight, head.bias]


def public_name(output: Output) -> str:
    """Return the name under which a caller knows an output."""
    source, what = output
    return what if source == POLICY else f"{source}.{what}"


def make_request(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    anchors: Mapping[str, tuple[Tensor, Head]] | None,
    want: Collection[str],
    temperature: float,
) -> Request:
    """Read ``want`` and check that everything fits together.

    Raises:
        ValueError: saying what does not fit, with both sizes.
    """
    given = {name: Anchor(*pair) for name, pair in (anchors or {}).items()}
    if POLICY in given:
        raise ValueError(f"an anchor is named {POLICY!r}, as the policy itself is; give it another name")
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; it must be above 0")
    wanted = read_want(want, given)
    sources = {
        name: Anchor(rows, gathered(each)) for name, (rows, each) in {POLICY: (hidden, head), **given}.items()
    }
    for name, source in sources.items():
        _check_source(name, source, sources[POLICY])
    check_targets(targets, hidden.shape[0], head.tokens)
    doubles = (
        tensor.dtype == torch.float64 for source in sources.values() for tensor in source_tensors(source)
    )
    dtype = torch.float64 if any(doubles) else torch.float32
    return Request(sources, wanted, targets.to(torch.int64), temperature, dtype)


def checked_loss(loss: Tensor) -> Tensor:
    """Pass on what ``per_token`` returned, if it is one number."""
    if loss.ndim != 0:
        raise ValueError(
            f"per_token returned shape {tuple(loss.shape)}; return the sum over the chunk, a scalar"
        )
    return loss


def read_want(want: Collection[str], anchors: Iterable[str]) -> tuple[Output, ...]:
    """Return the outputs that are meant, in a fixed order.

    Raises:
        ValueError: for an unknown name, listing those that the anchors make known.
    """
    own = [(POLICY, output) for output in (*POLICY_OUTPUTS, *TOKEN_OUTPUTS)]
    known = own + [(anchor, each) for anchor in anchors for each in (*ANCHOR_OUTPUTS, *TOKEN_OUTPUTS)]
    names = [public_name(output) for output in known]
    for name in want:
        if name not in names:
            raise ValueError(f"{name!r} is wanted; with the anchors given the head knows: {', '.join(names)}")
    return tuple(output for output, name in zip(known, names, strict=True) if name in want)


def _check_source(name: str, source: Anchor, policy: Anchor) -> None:
    hidden, head = source
    refuse_sharded(name, hidden)
    if hidden.ndim != 2 or hidden.shape[1] != head.weight.shape[1]:
        raise ValueError(
            f"{name!r} has hidden states of shape {tuple(hidden.shape)} and a head of shape "
            f"{tuple(head.weight.shape)}; they must be [tokens, H] and [vocabulary, H]"
        )
    if hidden.shape[0] != policy.hidden.shape[0]:
        raise ValueError(
            f"anchor {name!r} has {hidden.shape[0]} hidden states, the policy {policy.hidden.shape[0]}; "
            "give those of the same tokens"
        )
    if head.tokens != policy.head.tokens:
        raise ValueError(
            f"anchor {name!r} has a vocabulary of {head.tokens} tokens, the policy one of "
            f"{policy.head.tokens}; they must be the same (set Head.vocabulary where a weight is padded)"
        )


def check_targets(targets: Tensor, rows: int, tokens: int) -> None:
    """Refuse targets that do not fit.

    Raises:
        ValueError: if there are not as many as rows or, on a CPU, one is not in the vocabulary.
    """
    if targets.shape != (rows,):
        raise ValueError(f"targets have shape {tuple(targets.shape)}; there are {rows} hidden states")
    if targets.device.type == "cpu" and rows > 0:  # on other devices the look would wait for them
        low, high = (int(bound) for bound in targets.aminmax())
        if low < 0 or high >= tokens:
            raise ValueError(f"targets reach from {low} to {high}; the vocabulary has 0 to {tokens - 1}")
