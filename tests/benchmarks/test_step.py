"""The benchmark of a whole step, at a tiny size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import step


def test_a_tiny_run_times_kedge_and_names_its_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "one.json"
    monkeypatch.setattr(step, "RUNS", {"kedge": step.run_kedge})  # with TRL installed, too
    monkeypatch.setattr("sys.argv", ["step", "--shape", "tiny", "--rounds", "1", "--out", str(output)])
    monkeypatch.chdir(Path(__file__).parents[2])
    assert step.main() == 0
    found = json.loads(output.read_text(encoding="utf-8"))
    assert found["machine"]["vectors"]
    assert found["tiny"]["figures"]["kedge"]["seconds"] > 0
    assert found["tiny"]["verdicts"] == []


def test_verdicts_are_shares_of_what_trl_takes() -> None:
    figures = {"kedge": {"seconds": 1.0, "peak_bytes": 4}, "trl": {"seconds": 4.0, "peak_bytes": 8}}
    found = {
        each["what"]: (each["share"], each["holds"]) for each in step.verdicts(step.SHAPES["wide"], figures)
    }
    assert found == {"seconds": (0.25, True), "peak_bytes": (0.5, False)}
