"""Which groups of responses are drawn again: those that teach a comparison nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import kedge
from kedge.rollout import Rollout
from kedge.training.collect import Batch, learnt_from, teaching_groups, worth_of
from kedge.training.config import RolloutConfig
from tests.training.small import GRPO, recipe

FINISHED = torch.tensor([True, False, False, False, True, False])
"""Of three groups of two."""


def batch(*total: float) -> Batch:
    """Responses of one token each, with these rewards."""
    tokens, count = torch.arange(len(total)), len(total)
    group, nothing = tokens // 2, torch.zeros(count)
    prompts, ones = torch.zeros(count // 2, dtype=torch.long), torch.ones(count, dtype=torch.long)
    mask = torch.ones(count, dtype=torch.bool)
    rollout = Rollout(prompts, ones[: count // 2], tokens, ones, group, mask, nothing, FINISHED[:count])
    return Batch(rollout, list(range(count // 2)), {"total": torch.tensor(total)})


@pytest.mark.parametrize(
    ("config", "total", "expected"),
    [
        ({"truncated": "keep"}, (1, 1, 0, 1, 0, 1), [False, True, True]),
        (
            {"truncated": "mask"},
            (1, 1, 0, 1, 0, 1),
            [False, False, True],
        ),  # none of the second is learnt from
        ({"truncated": "penalise", "truncation_penalty": 1.0}, (1, 1, 0, 1, 0, 1), [True, True, False]),
        ({"truncated": "keep"}, (1, float("nan"), 0, 1, 2, 2), [False, True, False]),
    ],
)
def test_what_teaches_is_judged_by_what_is_learnt_from(
    config: dict[str, Any], total: tuple[float, ...], expected: list[bool]
) -> None:
    settings = RolloutConfig.model_validate(config)
    given = batch(*map(float, total))
    if config["truncated"] == "penalise":  # 0 less nothing and 1 less the penalty are equal
        assert worth_of(given, settings)[4:].tolist() == [0.0, 0.0]
    found = teaching_groups(worth_of(given, settings), learnt_from(given, settings), given.rollout.group, 3)
    assert found.tolist() == expected


def test_groups_that_differ_in_what_being_cut_costs_are_kept(tmp_path: Path) -> None:
    (tmp_path / "one.py").write_text(
        "def one(prompts, completions, **columns):\n    return [1.0] * len(prompts)\n"
    )
    rollout = {
        **GRPO["rollout"],
        "truncated": "penalise",
        "truncation_penalty": 1.0,
        "resample_equal_groups": 1,
    }
    rewards = {"functions": [{"function": f"{tmp_path / 'one.py'}:one"}]}
    stage = {**GRPO, "rollout": rollout, "rewards": rewards, "evaluation": None}
    rows = kedge.train(recipe(tmp_path, stage)).stages["grpo"].metrics
    assert min(row["rollout/times_resampled"] for row in rows) == 0
    assert max(row["gradient/norm"] for row in rows) > 0
