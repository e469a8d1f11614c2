"""What happens to every logit of a block of rows: pure functions of tensors, run as they stand or compiled."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kedge.divergence import (
    FAR,
    Normalizer,
    entropy_from_log_probs,
    kl_from_log_probs,
    log_ratio_of_logits,
    normalizer,
    total_variation_from_log_probs,
)
from kedge.head.gradients import Comparison, Pull, Signs, logit_gradient
from kedge.head.request import DIVERGENCES, POLICY, Output


@dataclass(frozen=True)
class Transform:
    """From the product h Wᵀ to the logits of ``Head``, and the way back."""

    scale: float
    softcap: float | None
    temperature: float

    def changes(self, bias: Tensor | None) -> bool:
        """Whether logits are anything but the product."""
        return bias is not None or self.softcap is not None or self.scale != self.temperature

    def apply(self, product: Tensor, bias: Tensor | None) -> Tensor:
        """Turn a product into finite logits, in place."""
        if bias is not None:
            product += bias
        if self.softcap is not None:
            masked = product == -math.inf
            product.mul_(self.scale / self.softcap).tanh_().mul_(self.softcap / self.temperature)
            product.masked_fill_(masked, -math.inf)
        elif self.scale != self.temperature:
            product *= self.scale / self.temperature
        if bias is not None:
            product.clamp_(min=-FAR)
        return product

    def pull_back(self, gradient: Tensor, logits: Tensor) -> Tensor:
        """Turn the gradient of logits into that of h Wᵀ + b."""
        if self.softcap is not None:
            tanh = (logits * (self.temperature / self.softcap)).clamp(min=-1.0)
            gradient = gradient * (1.0 - tanh.square())
        factor = self.scale / self.temperature
        return gradient if factor == 1.0 else gradient * factor


@dataclass(frozen=True)
class Plan:
    """What is done to a block, apart from the tensors.

    Args:
        transforms: of each source that is involved, the policy among them if it is.
        wanted: the outputs to compute.
        moved: the sources whose logits need a gradient.
    """

    transforms: tuple[tuple[str, Transform], ...]
    wanted: tuple[Output, ...]
    moved: tuple[str, ...] = ()


Normalizers = dict[str, Normalizer]


def forward(
    plan: Plan, products: Mapping[str, Tensor], biases: Mapping[str, Tensor | None], targets: Tensor
) -> tuple[Normalizers, dict[Output, Tensor]]:
    """Turn products [n, V] into logits, in place; return their normalisers, and every wanted output, [n] each."""
    transform(plan, products, biases)
    return score(plan, products, targets)


def transform(plan: Plan, products: Mapping[str, Tensor], biases: Mapping[str, Tensor | None]) -> None:
    """Turn products into logits, in place."""
    for source, made in plan.transforms:
        made.apply(products[source], biases[source])


def score(
    plan: Plan, logits: Mapping[str, Tensor], targets: Tensor
) -> tuple[Normalizers, dict[Output, Tensor]]:
    """Return the logits' normalisers, and every wanted output, [n] each."""
    normalizers = {
        source: normalizer(logits[source], _maximum(logits[source])) for source, _ in plan.transforms
    }
    block = _Block(logits, normalizers)
    return normalizers, {output: block.score(*output, targets) for output in plan.wanted}


def overwrite(
    plan: Plan,
    logits: Mapping[str, Tensor],
    chosen: Mapping[str, Tensor],
    normalizers: Normalizers,
    pulls: Mapping[Output, Pull],
) -> dict[str, Tensor]:
    """Do what ``backward`` does, but at the targets; return what belongs there, [n, 1], where it is something else.

    ``chosen`` are the logits of the targets, [n, 1], if any log-probability pulls. These would be read and written by
    index; the rest is one pass in place, once it is compiled (where a total variation pulls, after one of sums).
    """
    whole, column = _Block(logits, normalizers), _Block(chosen, normalizers)
    gradients, at_targets = {}, {}
    for source in plan.moved:
        signs = whole.signs(source, pulls)
        gradients[source] = whole.gradient(source, pulls, signs, at_targets=False)
        if (source, "log_prob") in pulls:
            at_targets[source] = column.gradient(source, pulls, signs, at_targets=True)
    for source, made in plan.transforms:
        if source in gradients:
            logits[source].copy_(made.pull_back(gradients[source], logits[source]))
        if source in at_targets:
            at_targets[source] = made.pull_back(at_targets[source], chosen[source])
    return at_targets


def backward(
    plan: Plan,
    logits: Mapping[str, Tensor],
    normalizers: Normalizers,
    targets: Tensor,
    pulls: Mapping[Output, Pull],
    apart: Mapping[str, Tensor],
    *,
    run: Callable[..., dict[str, Tensor]] = overwrite,
) -> None:
    """Overwrite the logits of every source that is moved with the gradient of its h Wᵀ + b.

    Where ``apart`` has a tensor for a source, [n, V] of any dtype, the gradient is there. ``run`` is ``overwrite``, or
    what does the same.
    """
    chosen: dict[str, Tensor] = {}
    if any((source, "log_prob") in pulls for source in plan.moved):
        chosen = {source: each.gather(-1, targets[:, None]) for source, each in logits.items()}
    at_targets = run(plan, logits, chosen, normalizers, pulls)
    for source, gradient in at_targets.items():
        logits[source].scatter_(-1, targets[:, None], gradient)
    for source, place in apart.items():
        place.copy_(logits[source])


def _maximum(logits: Tensor) -> Tensor:
    """Return the maximum of each row, [n, 1], from four parts of it, which may overlap.

    Every step of a compiled loop waits for the one before, and compares in less time than it waits.
    """
    tokens = logits.shape[-1]
    width = -(-tokens // 4)
    first, second, third, last = (logits.narrow(-1, min(i * width, tokens - width), width) for i in range(4))
    return torch.maximum(torch.maximum(first, second), torch.maximum(third, last)).amax(-1, keepdim=True)


class _Block:
    """The distributions of a block of rows; what several outputs need of them is computed once."""

    def __init__(self, logits: Mapping[str, Tensor], normalizers: Normalizers) -> None:
        self._logits, self._normalizers = logits, normalizers
        self._log_probs: dict[str, Tensor] = {}
        self._log_ratios: dict[str, Tensor] = {}
        self._compared: dict[str, list[Comparison]] = {}

    def log_probs(self, source: str) -> Tensor:
        """Return the finite log-probabilities [n, V] of a source."""
        if source not in self._log_probs:
            self._log_probs[source] = self._normalizers[source].log_probs(self._logits[source])
        return self._log_probs[source]

    def log_ratio(self, source: str) -> Tensor:
        """Return the logarithm of a source's probabilities over the policy's, [n, V]."""
        if source not in self._log_ratios:
            p, q = self._normalizers[POLICY], self._normalizers[source]
            self._log_ratios[source] = log_ratio_of_logits(self._logits[POLICY], p, self._logits[source], q)
        return self._log_ratios[source]

    def score(self, source: str, what: str, targets: Tensor) -> Tensor:
        """Return an output, [n]."""
        normalizer = self._normalizers[source]
        if what == "log_normalizer":
            return (normalizer.maximum + normalizer.log_sum).squeeze(-1)
        if what == "top_token":
            return self._logits[source].argmax(-1)
        if what == "log_prob":
            chosen = self._logits[source].gather(-1, targets[:, None])
            log_prob = normalizer.log_probs(chosen).squeeze(-1)
            return log_prob.masked_fill(log_prob < -0.5 * FAR, -math.inf)
        log_q = self.log_probs(source)
        if what == "entropy":
            return entropy_from_log_probs(log_q)
        log_p, x = self.log_probs(POLICY), self.log_ratio(source)
        if what == "reverse_kl":
            return kl_from_log_probs(log_p, log_q, x)
        if what == "forward_kl":
            return kl_from_log_probs(log_q, log_p, -x)
        return total_variation_from_log_probs(log_p, log_q, x)

    def gradient(
        self, source: str, pulls: Mapping[Output, Pull], signs: list[Signs | None], *, at_targets: bool
    ) -> Tensor:
        """Return the gradient of a source's logits, as ``logit_gradient`` does."""
        own = {each: pulls.get((source, each)) for each in ("log_prob", "entropy", "log_normalizer")}
        compared = self._comparisons(source, pulls)
        return logit_gradient(self.log_probs(source), compared, signs, at_targets=at_targets, **own)

    def signs(self, source: str, pulls: Mapping[Output, Pull]) -> list[Signs | None]:
        """Return what the gradient needs of the whole vocabulary."""
        return [Signs.of(each) for each in self._comparisons(source, pulls)]

    def _comparisons(self, source: str, pulls: Mapping[Output, Pull]) -> list[Comparison]:
        """Return what a source is compared with by divergences that pull, seen from it."""
        if source not in self._compared:
            compared = dict.fromkeys(name for name, output in pulls if output in DIVERGENCES)
            if source == POLICY:
                self._compared[source] = [self._comparison(name, pulls) for name in compared]
            else:
                seen = [self._comparison(source, pulls).reversed()] if source in compared else []
                self._compared[source] = seen
        return self._compared[source]

    def _comparison(self, source: str, pulls: Mapping[Output, Pull]) -> Comparison:
        return Comparison(
            log_p=self.log_probs(POLICY),
            log_q=self.log_probs(source),
            log_ratio=self.log_ratio(source),
            outward=pulls.get((source, "reverse_kl")),
            inward=pulls.get((source, "forward_kl")),
            variation=pulls.get((source, "total_variation")),
        )
