"""What every contender is given: hidden states, weights, sampled tokens, advantages."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

LOGIT_STD, DRIFT, RESPONSES = 3.0, 0.01, 4


@dataclass(frozen=True)
class Size:
    rows: int
    width: int
    tokens: int

    @classmethod
    def read(cls, text: str) -> Size:
        """Read "N,H,V"; rows are split evenly into responses."""
        size = cls(*(int(part) for part in text.split(",")))
        if size.rows % RESPONSES or min(size.rows, size.width, size.tokens) < 1:
            raise ValueError(f"size {text!r}: N must be a multiple of {RESPONSES}, H and V above 0")
        return size

    def __str__(self) -> str:
        return f"{self.rows},{self.width},{self.tokens}"


@dataclass(frozen=True)
class Inputs:
    """One rollout's response tokens: ``RESPONSES`` responses of equal length, packed.

    The reference differs from the policy by ``DRIFT`` times noise, in hidden states and in a weight of its own.
    Tokens are drawn from the policy; ``old_log_prob`` is near the policy's, so that ratios are near 1.
    """

    size: Size
    hidden: Tensor
    weight: Tensor
    reference_hidden: Tensor
    reference_weight: Tensor
    targets: Tensor
    old_log_prob: Tensor
    reference_log_prob: Tensor
    advantages: Tensor  # one a response

    @property
    def token_advantages(self) -> Tensor:
        return self.advantages.repeat_interleave(self.size.rows // RESPONSES)

    def first(self, rows: int) -> Inputs:
        """Return the first rows, at most as many as there are, with the same weights, whose memory is shared."""
        rows = min(rows, self.size.rows)
        hidden = self.hidden.detach()[:rows].clone().requires_grad_()
        return replace(
            self,
            size=replace(self.size, rows=rows),
            hidden=hidden,
            reference_hidden=self.reference_hidden[:rows],
            targets=self.targets[:rows],
            old_log_prob=self.old_log_prob[:rows],
            reference_log_prob=self.reference_log_prob[:rows],
        )

    def double(self) -> Inputs:
        return replace(
            self,
            hidden=self.hidden.detach().double().requires_grad_(),
            weight=self.weight.detach().double().requires_grad_(),
            reference_hidden=self.reference_hidden.double(),
            reference_weight=self.reference_weight.double(),
            old_log_prob=self.old_log_prob.double(),
            reference_log_prob=self.reference_log_prob.double(),
            advantages=self.advantages.double(),
        )

    def forget_gradients(self) -> None:
        self.hidden.grad = self.weight.grad = None


def make_inputs(size: Size, device: torch.device, dtype: torch.dtype) -> Inputs:
    generator = torch.Generator(device).manual_seed(0)
    spread = LOGIT_STD / size.width**0.5

    def normal(*shape: int, std: float) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).mul_(std)

    hidden, weight = normal(size.rows, size.width, std=1.0), normal(size.tokens, size.width, std=spread)
    reference_hidden = normal(size.rows, size.width, std=DRIFT).add_(hidden).to(dtype)
    reference_weight = normal(size.tokens, size.width, std=DRIFT * spread).add_(weight).to(dtype)
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    targets = torch.empty(size.rows, dtype=torch.int64, device=device)
    old, reference = torch.empty(2, size.rows, device=device)
    for start in range(0, size.rows, 32):  # few rows at a time: a peak here would hide that of a contender
        rows = slice(start, start + 32)
        log_p = (hidden[rows] @ weight.T).float().log_softmax(-1)
        targets[rows] = torch.multinomial(log_p.exp(), 1, generator=generator).squeeze(-1)
        old[rows] = log_p.gather(-1, targets[rows, None]).squeeze(-1)
        log_q = (reference_hidden[rows] @ reference_weight.T).float().log_softmax(-1)
        reference[rows] = log_q.gather(-1, targets[rows, None]).squeeze(-1)
    return Inputs(
        size=size,
        hidden=hidden.requires_grad_(),
        weight=weight.requires_grad_(),
        reference_hidden=reference_hidden,
        reference_weight=reference_weight,
        targets=targets,
        old_log_prob=old + normal(size.rows, std=0.02),
        reference_log_prob=reference,
        advantages=normal(RESPONSES, std=1.0),
    )
