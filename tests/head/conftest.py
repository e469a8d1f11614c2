"""Small heads with everything that a head may have, and one way to get values and gradients out of each backend."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import jaxtyping
import pytest
import torch
from torch import Tensor

from kedge.head import ANCHOR_OUTPUTS, POLICY_OUTPUTS, Anchor, Head, reduce, score

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton looks when it meets a kernel

Found = tuple[dict[str, Tensor], dict[str, Tensor | None]]


@dataclass
class Case:
    """Inputs of the head, its trainable tensors by name, and an upstream gradient for every output."""

    hidden: Tensor
    head: Head
    targets: Tensor
    anchors: dict[str, Anchor]
    temperature: float
    trained: dict[str, Tensor] = field(default_factory=dict)
    upstream: dict[str, Tensor] = field(default_factory=dict)

    @property
    def outputs(self) -> list[str]:
        return [*POLICY_OUTPUTS, *(f"{name}.{output}" for name in self.anchors for output in ANCHOR_OUTPUTS)]

    def score(self, want: Sequence[str] | None = None, **options: Any) -> Found:
        """Scores, and the gradients of Σ upstream·score, by name."""
        scores = score(
            self.hidden,
            self.head,
            self.targets,
            anchors=self.anchors,
            want=self.outputs if want is None else want,
            temperature=self.temperature,
            **options,
        )
        moving = [name for name, values in scores.items() if values.requires_grad]
        return scores, self._gradients(
            [scores[name] for name in moving], [self.upstream[name] for name in moving]
        )

    def reduce(self, want: Sequence[str] | None = None, **options: Any) -> Found:
        """The same through ``reduce``, twice the loss and half the upstream gradient."""

        def per_token(scores: dict[str, Tensor], rows: slice) -> Tensor:
            moving = ((name, values) for name, values in scores.items() if name in self.upstream)
            return 2 * sum((self.upstream[name][rows] * values).sum() for name, values in moving)

        loss, scores = reduce(
            self.hidden,
            self.head,
            self.targets,
            per_token,
            anchors=self.anchors,
            want=self.outputs if want is None else want,
            temperature=self.temperature,
            **options,
        )
        return scores, self._gradients([loss], [torch.full_like(loss, 0.5)])

    def _gradients(self, values: list[Tensor], upstream: list[Tensor]) -> dict[str, Tensor | None]:
        if not any(value.requires_grad for value in values):
            return dict.fromkeys(self.trained)
        found = torch.autograd.grad(values, list(self.trained.values()), upstream, allow_unused=True)
        return dict(zip(self.trained, found, strict=True))


@pytest.fixture
def make_case() -> Callable[..., Case]:
    """Build a case; ``train`` says which sources and which of their tensors need gradients."""

    def build(
        *,
        dtype: torch.dtype = torch.float64,
        rows: int = 9,
        tokens: int = 11,
        padding: int = 0,
        bias: bool = False,
        masked: dict[str, list[int]] | None = None,
        scale: float = 1.0,
        softcap: float | None = None,
        temperature: float = 1.0,
        anchors: Sequence[str] = ("reference",),
        train: Sequence[str] = ("policy.hidden", "policy.weight", "policy.bias"),
        drift: float | None = None,
        seed: int = 0,
    ) -> Case:
        generator = torch.Generator().manual_seed(seed)
        masked = masked or {}
        trained: dict[str, Tensor] = {}

        def source(name: str, width: int) -> Anchor:
            tensors = {
                "hidden": torch.randn(rows, width, dtype=torch.float64, generator=generator),
                "weight": torch.randn(tokens + padding, width, dtype=torch.float64, generator=generator),
                "bias": torch.randn(tokens + padding, dtype=torch.float64, generator=generator),
            }
            if drift is not None and name != "policy":
                for key, origin in (("hidden", "policy.hidden"), ("weight", "policy.weight")):
                    tensors[key] = origins[origin].detach() + drift * tensors[key]
            tensors["bias"][masked.get(name, [])] = -torch.inf
            origins.update({f"{name}.{key}": tensor for key, tensor in tensors.items()})
            tensors = {key: tensor.to(dtype) for key, tensor in tensors.items()}
            if not bias and name not in masked:
                del tensors["bias"]
            for key, tensor in tensors.items():
                if f"{name}.{key}" in train:
                    trained[f"{name}.{key}"] = tensor.requires_grad_()
            head = Head(
                tensors["weight"],
                tensors.get("bias"),
                scale,
                softcap,
                vocabulary=tokens if padding else None,
            )
            return Anchor(tensors["hidden"], head)

        origins: dict[str, Tensor] = {}
        policy = source("policy", 4)
        others = {
            name: source(name, 4 if drift is not None else 5 + index) for index, name in enumerate(anchors)
        }
        case = Case(
            hidden=policy.hidden,
            head=policy.head,
            targets=torch.randint(0, tokens, (rows,), generator=generator),
            anchors=others,
            temperature=temperature,
            trained=trained,
        )
        out_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        case.upstream = {
            name: torch.randn(rows, dtype=torch.float64, generator=generator).to(out_dtype)
            for name in case.outputs
        }
        return case

    return build


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Run as users do, without the run-time type checks of the tests."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
