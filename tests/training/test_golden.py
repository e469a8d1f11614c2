"""A golden trajectory: a whole run on the CPU, in float64, to the digits that every machine agrees on.

A change that should not alter results leaves it as it is. One that should: run
``python -m tests.training.test_golden`` and say in the commit why the numbers moved.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import pytest

import kedge
from tests.training.small import GRPO, MODEL, PPO, SFT, recipe, without_clock

FILE = Path(__file__).with_name("golden.json")
STAGES = (
    SFT,
    {**GRPO, "epochs": 2, "minibatches": 2, "old_kl_limit": 1.0, "trust_region": {"low": 0.01, "high": 0.01}},
    {
        **PPO,
        "start": "sft",
        "rollout": {**PPO["rollout"], "prompts_per_step": 16, "responses_per_prompt": 1},
        "trust_region": {
            "penalty": {"beta": 1.0, "target": 2e-3},
            "mask": {"measure": "kl", "threshold": 1e-3},
        },
    },
)


def trajectory(folder: Path) -> dict[str, list[dict[str, float]]]:
    result = kedge.train(recipe(folder, *STAGES, model={**MODEL, "dtype": "float64"}))
    return {name: without_clock(stage.metrics) for name, stage in result.stages.items()}


def test_golden(tmp_path: Path) -> None:
    golden = json.loads(FILE.read_text(encoding="utf-8"))
    found = trajectory(tmp_path)
    for name, rows in golden.items():
        assert len(rows) == len(found[name])
        for expected, row in zip(rows, found[name], strict=True):
            assert row.keys() == expected.keys()
            assert row == pytest.approx(expected, rel=1e-7, abs=1e-12, nan_ok=True)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        FILE.write_text(json.dumps(trajectory(Path(place)), indent=1) + "\n", encoding="utf-8")
    sys.exit(0)
