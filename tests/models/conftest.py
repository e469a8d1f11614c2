"""Tiny random models of every architecture, made once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from kedge.models import build_model

OPTIONS: dict[str, dict[str, object]] = {
    "llama": {},
    "qwen3": {},
    "gemma2": {"sliding_window": 4, "initializer_range": 0.3},
    "gpt2": {},
    "mistral": {"sliding_window": 4},
}
VOCABULARY = 67


@pytest.fixture(params=sorted(OPTIONS))
def architecture(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def make() -> Callable[..., PreTrainedModel]:
    def build(
        architecture: str, dtype: torch.dtype = torch.float32, attention: str | None = None
    ) -> PreTrainedModel:
        options = {"initializer_range": 0.2, **OPTIONS[architecture]}
        if architecture == "gemma2" and attention == "sdpa":  # which knows no soft-cap of its own
            options["attn_logit_softcapping"] = None
        model = build_model(
            VOCABULARY,
            architecture=architecture,
            hidden_size=32,
            layers=2,
            heads=4,
            intermediate_size=48,
            context=32,
            seed=3,
            eos_id=1,
            options=options,
        )
        if attention is not None:
            model.config._attn_implementation = attention
        return model.to(dtype)

    return build


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Four sequences, packed, the longest beyond the sliding windows."""
    lengths = torch.tensor([7, 1, 12, 4])
    generator = torch.Generator().manual_seed(5)
    return torch.randint(0, VOCABULARY, (int(lengths.sum()),), generator=generator), lengths
