"""Tiny random models of every architecture with a byte-level tokenizer."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from kedge.models import build_model, train_bpe

WINDOWS = {"gemma2": {"sliding_window": 4}, "mistral": {"sliding_window": 4}}


@pytest.fixture(params=["gemma2", "gpt2", "llama", "mistral", "qwen3"])
def architecture(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_bpe(["a b c"], 258)


@pytest.fixture
def make() -> Callable[..., PreTrainedModel]:
    def build(architecture: str = "llama", vocabulary: int = 258, spread: float = 0.2) -> PreTrainedModel:
        return build_model(
            vocabulary,
            architecture=architecture,
            hidden_size=32,
            layers=2,
            heads=4,
            intermediate_size=48,
            context=48,
            seed=3,
            pad_id=0,
            eos_id=1,
            options={"initializer_range": spread, **WINDOWS.get(architecture, {})},
        )

    return build


@pytest.fixture
def prompts() -> list[list[int]]:
    """Prompts of different lengths, some beyond the sliding windows."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(2, 258, (length,), generator=generator).tolist() for length in (3, 9, 1, 6)]
