"""What a caller asks of the head, checked."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TypeVar

import torch
from torch import Tensor

from kedge.head.sharded import gathered, refuse_sharded
from kedge.head.types import Anchor, Head, check_factor

POLICY = "policy"
DIVERGENCES = ("reverse_kl", "forward_kl", "total_variation")
POLICY_OUTPUTS = ("log_prob", "entropy", "log_normalizer")
ANCHOR_OUTPUTS = ("log_prob", "entropy", *DIVERGENCES)
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
TOKEN_OUTPUTS = ("top_token",)
"""Outputs of every source that are token ids: nothing flows back through them."""

T = TypeVar("T")
Output = tuple[str, str]
"""A source, which is POLICY or the name of an anchor, and what is wanted of it."""


@dataclass(frozen=True, eq=False)
class Request:
    """A checked call of the head.

    Args:
        sources: hidden states and head of the policy, under POLICY, then of each anchor that is needed, under its name.
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
        return involved(self.sources, self.wanted)

    def tensors(self) -> list[Tensor]:
        """Return the hidden states, the weight and, if there is one, the bias of each source in turn."""
        return [tensor for source in self.sources.values() for tensor in source_tensors(source)]

    def outline(self) -> Request:
        """Return the same request of tensors without numbers, for whoever keeps those elsewhere."""
        targets, *empty = (
            torch.empty(each.shape, dtype=each.dtype, device="meta")
            for each in (self.targets, *self.tensors())
        )
        return replace(self.with_tensors(empty), targets=targets)

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


def involved(sources: Iterable[str], wanted: Collection[Output]) -> list[str]:
    """Return the sources whose logits are needed for these outputs."""
    needed = {source for source, _ in wanted} | {POLICY for _, output in wanted if output in DIVERGENCES}
    return [source for source in sources if source in needed]


def moves(output: Output, source: str) -> bool:
    """Whether an output has a gradient in the logits of a source."""
    of, what = output
    return what not in TOKEN_OUTPUTS and (of == source or (what in DIVERGENCES and source == POLICY))


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
    check_factor("temperature", temperature)
    wanted = read_want(want, given)
    policy = Anchor(hidden, head)
    sources = {POLICY: policy, **given}
    for name, source in sources.items():
        _check_source(name, source, policy)
    check_targets(targets, hidden.shape[0], head.tokens, hidden.device)
    needed = {
        name: Anchor(rows, gathered(each))
        for name, (rows, each) in sources.items()
        if name in involved(sources, wanted)
    }
    tensors = [tensor for source in needed.values() for tensor in source_tensors(source)]
    dtype = torch.float64 if any(each.dtype == torch.float64 for each in tensors) else torch.float32
    return Request({POLICY: policy} | needed, wanted, targets.to(torch.int64), float(temperature), dtype)


def checked_loss(loss: Tensor) -> Tensor:
    """Pass on what ``per_token`` returned, if it is one number."""
    if not isinstance(loss, Tensor) or loss.ndim != 0:
        what = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"{loss!r}"
        raise ValueError(f"per_token returned {what}; return the sum over the chunk, a scalar tensor")
    return loss


def read_want(want: Collection[str], anchors: Iterable[str]) -> tuple[Output, ...]:
    """Return the outputs that are meant, in a fixed order.

    Raises:
        ValueError: for an unknown name, listing those that the anchors make known.
        TypeError: for a bare string.
    """
    if isinstance(want, str):
        raise TypeError(f"want is the string {want!r}; give a collection of names, such as {{{want!r}}}")
    want = tuple(want)
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
    for what, tensor in zip(("hidden states", "a weight", "a bias"), source_tensors(source), strict=False):
        if tensor.dtype not in DTYPES:
            raise ValueError(
                f"{name!r} has {what} of {tensor.dtype}; the head reads float16, bfloat16, float32 and float64: "
                "dequantise the output head, as its format's scales say"
            )
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


def check_targets(targets: Tensor, rows: int, tokens: int, device: torch.device) -> None:
    """Refuse targets that do not fit.

    Raises:
        ValueError: if there are not as many as rows, they are on another device or, on a CPU, one is not in the
            vocabulary.
    """
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        raise ValueError(f"targets are {targets.dtype}; they must be ids of tokens, of an integer dtype")
    if targets.shape != (rows,):
        raise ValueError(
            f"targets have shape {tuple(targets.shape)}; there are {rows} rows of tokens to score"
        )
    if targets.device != device:
        raise ValueError(f"targets are on {targets.device}, what is scored on {device}; put them there, too")
    if targets.device.type == "cpu" and rows > 0:  # on other devices the look would wait for them
        low, high = (int(bound) for bound in targets.aminmax())
        if low < 0 or high >= tokens:
            raise ValueError(
                f"targets reach from {low} to {high}; the vocabulary has 0 to {tokens - 1}. Leave out the rows of "
                "tokens that do not count, of the targets and of what is scored"
            )
