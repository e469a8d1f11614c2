"""The head's backend in training: chosen by the recipe's work, the same numbers either way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kedge.errors import UserError
from kedge.training import backend
from kedge.training.config import ComputeConfig
from tests.training.small import GRPO, SFT, recipe

CPU = torch.device("cpu")


def test_little_work_is_not_compiled() -> None:
    assert backend.head_backend(ComputeConfig(), 1e9, CPU) == "chunked"
    assert backend.head_backend(ComputeConfig(), 1e11, CPU) == "compiled"
    assert backend.head_backend(ComputeConfig(compile_head=False), 1e11, CPU) == "auto"
    assert backend.head_backend(ComputeConfig(compile_head=False), 1e11, torch.device("cuda")) == "auto"
    assert backend.head_backend(ComputeConfig(compile_head=True), 1.0, CPU) == "compiled"


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("no-such-compiler",))
    assert backend.head_backend(ComputeConfig(), 1e11, CPU) == "chunked"
    with pytest.raises(UserError, match=r"compile_head: there is no working C\+\+ compiler"):
        backend.head_backend(ComputeConfig(compile_head=True), 1.0, CPU)


def test_a_run_with_a_compiled_head_has_the_same_figures(tmp_path: Path) -> None:
    """In a process without the tests' run-time type checks, which compiling does not go through."""
    found = []
    for compiled in (False, True):
        folder = tmp_path / str(compiled)
        folder.mkdir()
        stages = [
            {**stage, "compute": {"compile_head": compiled}, "evaluation": None, "steps": 2}
            for stage in (SFT, GRPO)
        ]
        code = "import json, sys, kedge; kedge.train(json.loads(sys.argv[1]))"
        command = [sys.executable, "-c", code, json.dumps(recipe(folder, *stages))]
        done = subprocess.run(
            command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
        assert done.returncode == 0, done.stderr
        found.append(
            [
                json.loads(line)
                for stage in ("sft", "grpo")
                for line in (folder / "run" / stage / "metrics.jsonl").read_text().splitlines()
            ]
        )
    eager, compiled = found
    for name in ("loss", "gradient/norm", "kl/policy_reference/exact", "entropy/policy"):
        values = [[row[name] for row in rows if name in row] for rows in (eager, compiled)]
        assert values[0], name
        assert values[0] == pytest.approx(values[1], rel=2e-5, abs=1e-7), name
