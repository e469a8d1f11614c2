from __future__ import annotations

import json
import math
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kedge.errors import RunError, UserError
from kedge.runs import (
    RunDirectory,
    environment,
    lines,
    read_config,
    read_environment,
    read_metrics,
    read_samples,
)

HOSTILE = "</script>\u2028\u202e\x00\x1b[31m héllo 🐎\r\n\ud83d"


def start(path: Path, config: dict | None = None, **options: object) -> RunDirectory:
    return RunDirectory.create(path, config or {"seed": 0}, **{"resume": False, **options})


@contextmanager
def ordinary_user() -> Iterator[Path]:
    """A folder made by whoever runs the tests, seen as a user without privileges."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    before = os.geteuid()
    if before == 0:
        os.seteuid(65534)
    else:
        folder.chmod(0o555)
    try:
        yield folder
    finally:
        if before == 0:
            os.seteuid(0)


def test_a_run_leaves_its_files(tmp_path: Path) -> None:
    run = start(tmp_path / "deep" / "run", {"method": "grpo", "anchor": {"budget": 0.1}, "out": Path("x")})
    assert not run.resumed
    assert read_config(run.path) == {"method": "grpo", "anchor": {"budget": 0.1}, "out": "x"}
    assert read_metrics(run.path) == []
    assert read_samples(run.path) == []
    run.metrics({"step": 0, "loss": torch.tensor(0.5), "tokens": 12, "clipped": True})
    run.samples([{"step": 0, "completion": HOSTILE, "tokens": ["a"], "kl": [math.nan], "reward": None}])
    assert read_metrics(run.path) == [{"step": 0, "loss": 0.5, "tokens": 12, "clipped": 1}]
    (sample,) = read_samples(run.path)
    assert sample["completion"] == HOSTILE
    assert math.isnan(sample["kl"][0])
    assert sample["reward"] is None


def test_an_existing_run_is_an_error_that_names_the_remedies(tmp_path: Path) -> None:
    start(tmp_path / "run")
    with pytest.raises(UserError, match=r"exists already.*resume=true.*another name"):
        start(tmp_path / "run")


def test_resume_continues_and_logs_what_changed(tmp_path: Path) -> None:
    start(tmp_path / "run", {"anchor": {"beta": 0.1, "kind": "exact"}}).metrics({"step": 1})
    run = start(tmp_path / "run", {"anchor": {"beta": 0.2, "kind": "exact"}, "new": 1}, resume=True)
    assert run.resumed
    assert read_metrics(run.path) == [{"step": 1}]
    log = (run.path / "log.txt").read_text()
    assert "resumed with other settings: anchor.beta: 0.1 → 0.2; new: None → 1" in log
    assert read_config(run.path)["anchor"]["beta"] == 0.2


def test_resume_without_a_run_starts_one_and_says_so(tmp_path: Path) -> None:
    run = start(tmp_path / "run", resume=True)
    assert not run.resumed
    assert "no run to resume" in (run.path / "log.txt").read_text()


def test_resume_refuses_a_folder_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"holds no run.*thesis\.tex"):
        start(tmp_path, resume=True)
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("name", ["file", "file/run"])
def test_a_file_in_the_way(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    for resume in (False, True):
        with pytest.raises(UserError, match="file: a file is in the way"):
            start(tmp_path / name, resume=resume)


def test_a_folder_that_cannot_be_written() -> None:
    with ordinary_user() as folder, pytest.raises(UserError, match=r"cannot be made \(Permission denied\)"):
        start(folder / "run")


def test_a_run_that_cannot_be_continued_by_this_user() -> None:
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    run = start(folder / "run")
    run.path.chmod(0o555)
    before = os.geteuid()
    if before == 0:
        os.seteuid(65534)
    try:
        with pytest.raises(UserError, match="cannot be written"):
            start(run.path, resume=True)
    finally:
        if before == 0:
            os.seteuid(0)


def test_metrics_are_strict_json(tmp_path: Path) -> None:
    run = start(tmp_path / "run")
    run.metrics({"step": 1, "a": math.nan, "b": -math.inf, "c": None, "d": 1e-300})

    def no_constants(name: str) -> None:
        raise AssertionError(name)

    text = (run.path / "metrics.jsonl").read_text()
    expected = {"step": 1, "a": None, "b": None, "c": None, "d": 1e-300}
    assert json.loads(text, parse_constant=no_constants) == expected
    assert math.isnan(read_metrics(run.path)[0]["b"])


@pytest.mark.parametrize(
    "row", [{"loss": 1.0}, {"step": 1.5}, {"step": 1, "loss": "low"}, {"step": 1, "x": [1]}]
)
def test_metrics_refuse_what_is_no_number(tmp_path: Path, row: dict) -> None:
    run = start(tmp_path / "run")
    with pytest.raises(ValueError, match=r"step|loss|'x'"):
        run.metrics(row)
    assert read_metrics(run.path) == []


def test_torn_lines_are_ignored_and_cut_on_resume(tmp_path: Path) -> None:
    run = start(tmp_path / "run")
    for step in range(3):
        run.metrics({"step": step})
        run.samples([{"step": step, "kl": []}])
    for name in ("metrics.jsonl", "samples.jsonl"):
        whole = (run.path / name).read_bytes()
        for length in range(len(whole)):
            (run.path / name).write_bytes(whole[:length])
            reader = read_metrics if name == "metrics.jsonl" else read_samples
            assert [row["step"] for row in reader(run.path)] == list(range(whole[:length].count(b"\n")))
    run = start(tmp_path / "run", resume=True)
    run.metrics({"step": 2})
    assert [row["step"] for row in read_metrics(run.path)] == [0, 1, 2]


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    run = start(tmp_path / "run")
    (run.path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2: not JSON"):
        read_metrics(run.path)
    (run.path / "metrics.jsonl").write_text('{"step": 1}\n7\n')
    with pytest.raises(UserError, match="line 2: not a JSON object"):
        read_metrics(run.path)


def test_truncate_after_keeps_bytes_of_earlier_steps(tmp_path: Path) -> None:
    run = start(tmp_path / "run")
    for step in range(5):
        run.metrics({"step": step, "loss": 1 / (step + 1)})
        run.samples([{"step": step, "completion": "x\u2028y", "kl": [0.1]}] * 2)
        if step == 2:
            kept = [(run.path / name).read_bytes() for name in ("metrics.jsonl", "samples.jsonl")]
    run.truncate_after(2)
    assert [(run.path / name).read_bytes() for name in ("metrics.jsonl", "samples.jsonl")] == kept


def test_refused_samples_of_updates_that_are_done_are_kept(tmp_path: Path) -> None:
    """A checkpoint inside step 3 has one of its updates; what came after is made again."""
    run = start(tmp_path / "run")
    rows = [
        (2, "evaluation", None),
        (3, "skipped", 1),
        (3, "skipped", 2),
        (3, "evaluation", None),
        (4, "skipped", 1),
    ]
    run.samples(
        [{"step": step, "kind": kind, "update": update, "completion": "x"} for step, kind, update in rows]
    )
    run.truncate_after(2, 1)
    assert [(row["step"], row["kind"], row["update"]) for row in read_samples(run.path)] == rows[:2]


def test_the_log_is_plain_text(tmp_path: Path) -> None:
    run = start(tmp_path / "run")
    run.log("\x1b[1;31mred\x1b[0m\rprogress\x07 100 %\nsecond line\t\x1b]8;;http://x\x1b\\link")
    *_, first, middle, last = (run.path / "log.txt").read_text().split("\n")[:-1]
    assert first[:4].isdigit()
    assert first.endswith("  red")
    assert middle == "    progress 100 %"
    assert last == "    second line\tlink"


def test_a_full_disk_damages_nothing(tmp_path: Path) -> None:
    run = start(tmp_path / "run")
    run.metrics({"step": 1})
    run.log("before")
    os.symlink("/dev/full", run.path / "samples.jsonl")
    with pytest.raises(RunError, match=r"samples\.jsonl.*No space left.*free some space.*resume=true"):
        run.samples([{"step": 1, "kl": []}])
    assert read_metrics(run.path) == [{"step": 1}]


def test_a_line_that_did_not_fit_leaves_no_piece(tmp_path: Path) -> None:
    file = tmp_path / "lines.jsonl"
    lines.append(file, b'{"step": 1}\n')
    script = (
        "import resource, pathlib; from kedge.runs import lines\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50, resource.RLIM_INFINITY))\n"
        f"lines.append(pathlib.Path({str(file)!r}), b'x' * 100)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert "RunError" in done.stderr
    assert "File too large" in done.stderr
    assert file.read_bytes() == b'{"step": 1}\n'
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 50


def test_environment_keeps_the_first_start(tmp_path: Path) -> None:
    run = start(tmp_path / "run")
    first = environment(device="cpu", seed=3, reference="abc", parameters=650_000)
    run.record_environment(first)
    assert read_environment(run.path) == first
    assert first["versions"].keys() == {"python", "kedge", "torch", "transformers"}
    assert first["threads"] == torch.get_num_threads()
    run.record_environment({**first, "device": "cuda:0"})
    run.record_environment({**first, "device": "cuda:1"})
    entries = read_environment(run.path)
    assert entries["device"] == "cpu"
    assert [later["device"] for later in entries["resumes"]] == ["cuda:0", "cuda:1"]


def test_reading_a_run_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such run"):
        read_metrics(tmp_path / "nowhere")


def test_reading_damaged_files_is_an_error_that_names_them(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("a: [")
    (tmp_path / "environment.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.yaml"):
        read_config(tmp_path)
    with pytest.raises(UserError, match=r"environment\.json"):
        read_environment(tmp_path)


def test_reading_runs_needs_no_torch() -> None:
    check = (
        "import sys, kedge.runs; assert 'torch' not in sys.modules\n"
        "kedge.runs.save_state; assert 'torch' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", check], check=True)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.lists(st.dictionaries(st.text(), json_values, max_size=3), max_size=4))
def test_lines_come_back(rows: list[dict]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        lines.append(file, lines.encode(rows))
        assert lines.read(file) == rows
