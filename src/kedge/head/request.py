"""What a caller asks of the head, checked."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kedge.head.types import Anchor, Head, compute_dtype

POLICY_OUTPUTS = ("log_prob", "entropy", "log_normalizer")
ANCHOR_OUTPUTS = ("log_prob", "reverse_kl", "forward_kl", "total_variation")


@dataclass(frozen=True, eq=False)
class Request:
    """A checked call of the head.

    Args:
        hidden: the policy's hidden states, [N, H].
        head: the policy's head.
        targets: the tokens whose log-probability is asked for, [N].
        anchors: those of the given anchors that some output needs.
        policy_outputs: which of POLICY_OUTPUTS are wanted.
        anchor_outputs: for each anchor, which of ANCHOR_OUTPUTS are wanted.
        temperature: every logit is divided by it.
        dtype: of logits and outputs.
    """

    hidden: Tensor
    head: Head
    targets: Tensor
    anchors: dict[str, Anchor]
    policy_outputs: frozenset[str]
    anchor_outputs: dict[str, frozenset[str]]
    temperature: float
    dtype: torch.dtype

    @property
    def names(self) -> list[str]:
        """The names of all wanted outputs, in a fixed order."""
        own = [output for output in POLICY_OUTPUTS if output in self.policy_outputs]
        others = (
            f"{name}.{output}"
            for name, outputs in self.anchor_outputs.items()
            for output in ANCHOR_OUTPUTS
            if output in outputs
        )
        return [*own, *others]


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
    policy_outputs, anchor_outputs = _read_want(want, given)
    used = {name: given[name] for name in anchor_outputs}
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; it must be above 0")
    _check_hidden("the policy", hidden, head)
    _check_targets(targets, hidden.shape[0], head.tokens)
    for name, anchor in used.items():
        _check_hidden(f"anchor {name!r}", anchor.hidden, anchor.head)
        if anchor.hidden.shape[0] != hidden.shape[0]:
            raise ValueError(
                f"anchor {name!r} has {anchor.hidden.shape[0]} hidden states where the policy has {hidden.shape[0]}; "
                "both must be of the same tokens"
            )
        if anchor.head.tokens != head.tokens:
            raise ValueError(
                f"anchor {name!r} has a vocabulary of {anchor.head.tokens} where the policy has {head.tokens}; set "
                "Head.vocabulary if one of them is padded; divergences need the same tokens"
            )
    parameters = [tensor for each in (Anchor(hidden, head), *used.values()) for tensor in _tensors(each)]
    return Request(
        hidden=hidden,
        head=head,
        targets=targets.to(torch.int64),
        anchors=used,
        policy_outputs=policy_outputs,
        anchor_outputs=anchor_outputs,
        temperature=temperature,
        dtype=compute_dtype(*parameters),
    )


def _read_want(
    want: Collection[str], anchors: Mapping[str, Anchor]
) -> tuple[frozenset[str], dict[str, frozenset[str]]]:
    if isinstance(want, str):
        raise ValueError(f"want is the string {want!r}; give a collection of names, such as {{{want!r}}}")
    policy_outputs: set[str] = set()
    anchor_outputs: dict[str, set[str]] = {}
    for wanted in want:
        name, dot, output = wanted.rpartition(".")
        if not dot and output in POLICY_OUTPUTS:
            policy_outputs.add(output)
        elif dot and name in anchors and output in ANCHOR_OUTPUTS:
            anchor_outputs.setdefault(name, set()).add(output)
        elif dot and name not in anchors:
            raise ValueError(
                f"{wanted!r} is wanted, but the anchors given are: {', '.join(anchors) or 'none'}"
            )
        else:
            known = [*POLICY_OUTPUTS, *(f"NAME.{each}" for each in ANCHOR_OUTPUTS)]
            raise ValueError(f"{wanted!r} is wanted, but the head knows only: {', '.join(known)}")
    return frozenset(policy_outputs), {
        name: frozenset(anchor_outputs[name]) for name in anchors if name in anchor_outputs
    }


def _check_hidden(whose: str, hidden: Tensor, head: Head) -> None:
    if hidden.ndim != 2 or hidden.shape[1] != head.weight.shape[1]:
        raise ValueError(
            f"{whose} has hidden states of shape {tuple(hidden.shape)}; its head's weight of shape "
            f"{tuple(head.weight.shape)} takes [tokens, {head.weight.shape[1]}]"
        )


def _check_targets(targets: Tensor, rows: int, tokens: int) -> None:
    if targets.shape != (rows,):
        raise ValueError(f"targets have shape {tuple(targets.shape)}; there are {rows} hidden states")
    if targets.device.type == "cpu" and rows > 0:  # elsewhere the check would wait for the device
        low, high = (int(bound) for bound in targets.aminmax())
        if low < 0 or high >= tokens:
            raise ValueError(
                f"targets lie between {low} and {high}; the vocabulary has the tokens 0 to {tokens - 1}"
            )


def _tensors(anchor: Anchor) -> tuple[Tensor, Tensor, Tensor | None]:
    return anchor.hidden, anchor.head.weight, anchor.head.bias
