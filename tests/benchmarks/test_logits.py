"""The benchmark of logits in hand runs at a tiny size, checks every contender, and fails when a goal does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import logits
from benchmarks.logits import BOTH, FORWARD, GPU_GOALS, GPU_SIZE, KL, LOG_PROB, TRAFFIC, Contender


def test_a_quick_run_times_every_contender(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "one.json"
    options = [
        "--device",
        "cpu",
        "--sizes",
        "12,50",
        "--rounds",
        "2",
        "--no-compile",
        "--output",
        str(output),
    ]
    monkeypatch.setattr("sys.argv", ["logits", *options])
    assert logits.main() == 0
    rows = json.loads(output.read_text(encoding="utf-8"))["rows"]
    took_part = [row for row in rows if row["absent"] is None]
    names = {(row["operation"], row["passes"], row["contender"]) for row in took_part}
    for operation, passes in TRAFFIC:
        for name in ("kedge score_logits chunked", "dense"):
            assert (operation, passes, name) in names
    for row in took_part:
        assert row["seconds"] > 0
        assert row["gradient_error"] < 1e-5
    assert all(row["absent"] for row in rows if "compiled" in row["contender"])


def test_a_contender_with_wrong_gradients_takes_no_part(monkeypatch: pytest.MonkeyPatch) -> None:
    def half_the_entropy(inputs: logits.Inputs) -> tuple[torch.Tensor, ...]:
        chosen, entropy = logits.plain_scores(LOG_PROB, logits._plain, inputs)
        return chosen, 0.5 * entropy

    wrong = Contender(LOG_PROB, "half of the entropy", half_the_entropy)
    monkeypatch.setattr(logits, "contenders", lambda device: iter([wrong]))
    (found,) = logits.measure("12,50", torch.device("cpu"), torch.float32, 1)
    assert "gradients are off" in str(found.failure)
    assert found.seconds == {FORWARD: [], BOTH: []}


def test_goals_are_those_of_a_gpu_in_bfloat16() -> None:
    entrant = Contender(KL, "kedge score_logits triton", logits.trl_scores)
    entrant.seconds = {FORWARD: [GPU_GOALS[KL, FORWARD]], BOTH: [1.01 * GPU_GOALS[KL, BOTH]]}
    text = ",".join(map(str, GPU_SIZE))
    forward, both = logits.figures(text, [entrant], torch.bfloat16)
    assert (logits.falls_short(forward), logits.falls_short(both)) == (False, True)
    assert not any(map(logits.falls_short, logits.figures(text, [entrant], torch.float32)))
