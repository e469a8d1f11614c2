"""Which way a model is run over responses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kedge.models import build_model
from kedge.rollout import Rollout
from kedge.training import scoring
from kedge.training.config import ComputeConfig
from kedge.training.scoring import Scorer


def rollout(prompt: int, response: int, responses: int) -> Rollout:
    """Two prompts of some length, with as many responses each."""
    count = 2 * responses
    return Rollout(
        prompt_tokens=torch.arange(2 * prompt) % 32,
        prompt_lengths=torch.tensor([prompt, prompt]),
        response_tokens=torch.arange(count * response) % 32,
        response_lengths=torch.full((count,), response),
        group=torch.arange(2).repeat_interleave(responses),
        mask=torch.ones(count * response, dtype=torch.bool),
        sampler_log_probs=torch.zeros(count * response),
        finished=torch.ones(count, dtype=torch.bool),
    )


@pytest.mark.parametrize(
    ("batch", "layout", "shared"),
    [
        (rollout(6, 6, 8), "padded", True),
        (rollout(6, 6, 8), "packed", False),
        (rollout(6, 6, 1), "padded", False),  # nothing is spared
        (rollout(1, 14, 8), "padded", False),  # 14 tokens of 240
        (rollout(2, 14, 8), "padded", True),  # 28 tokens of 256
    ],
)
def test_prompts_are_read_once_where_that_pays(
    batch: Rollout, layout: str, shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_model(32, hidden_size=8, layers=1, heads=2, context=16, seed=0)
    scorer = Scorer(ComputeConfig(layout=layout), 1.0, None)  # type: ignore[arg-type]
    ways: list[str] = []
    for name in ("response_states", "hidden_states"):
        real = getattr(scoring, name)

        def way(*given: Any, real: Any = real, name: str = name, **options: Any) -> Any:
            ways.append(name)
            return real(*given, **options)

        monkeypatch.setattr(scoring, name, way)
    hidden = scorer.hidden(model, batch)
    assert ways == ["response_states" if shared else "hidden_states"]
    expected = Scorer(ComputeConfig(layout="packed"), 1.0, None).hidden(model, batch)
    torch.testing.assert_close(hidden, expected, atol=1e-5, rtol=0)
