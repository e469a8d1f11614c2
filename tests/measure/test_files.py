"""Files and screen: what is written is what was found."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pyarrow import parquet
from rich.console import Console

from kedge.errors import UserError
from kedge.measure import SUMMARY, TOKENS, compare, read_summary, show
from kedge.measure.files import write
from kedge.measure.progress import PlainProgress, TerminalProgress, progress_for
from kedge.report import write_audit_page
from kedge.runs.audit import PAGE
from tests.measure.test_compare import PROMPTS, SMALL, TEXTS, model


def test_files_hold_what_was_found(tmp_path: Path) -> None:
    found = compare(model(0), model(1), **SMALL, out=tmp_path / "out")
    assert {each.name for each in (tmp_path / "out").iterdir()} >= {SUMMARY, TOKENS}
    summary = read_summary(tmp_path / "out")
    assert summary == json.loads(json.dumps(found.summary()))
    assert list(summary["questions"]) == ["policy_responses", "reference_responses", "texts"]
    assert summary["settings"]["seed"] == 0
    assert summary["environment"]["versions"]["torch"] == torch.__version__
    table = parquet.read_table(tmp_path / "out" / TOKENS)
    start = 0
    for name, answer in found.answers.items():
        part = table.slice(start, answer.tokens.count).to_pydict()
        assert set(part["question"]) == {name}
        for column, values in answer.tokens.columns().items():
            assert part[column] == values.tolist(), column
        for column, texts in answer.texts.items():
            assert part[column] == texts
        start += answer.tokens.count
    assert start == table.num_rows


def test_reading_what_is_not_there(tmp_path: Path) -> None:
    for content, match in (
        (None, "cannot be read"),
        ("{", "damaged"),
        ('{"format": "x"}', "not of the format"),
    ):
        if content is not None:
            (tmp_path / SUMMARY).write_text(content)
        with pytest.raises(UserError, match=match):
            read_summary(tmp_path)


def test_the_screen_is_narrow() -> None:
    found = compare(model(0), model(1), **SMALL)
    out = io.StringIO()
    show(found, Console(file=out, width=80))
    text = out.getvalue()
    assert "…" not in text.replace(" … ", "")
    for part in (
        "KL(policy‖reference), nats/response",
        "k3, sampled",
        "noise floor",
        "prompts with as many responses",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"prompts": PROMPTS[:1]}, "one prompt, "),
        ({"prompts": PROMPTS[:1], "responses": 1}, "one prompt has no interval: give more"),
        ({"texts": TEXTS[:1]}, "one text has no interval: give more"),
        ({"texts": TEXTS}, " texts\n"),
        ({"prompts": PROMPTS}, "prompts with as many responses each"),
        ({"prompts": PROMPTS, "responses": 1}, "; one each does not tell what more would do"),
    ],
)
def test_the_screen_says_what_is_needed(given: dict[str, Any], said: str) -> None:
    settings: dict[str, Any] = {"sample_from": "policy", "max_new_tokens": 4} if "prompts" in given else {}
    out = io.StringIO()
    common = {"tokenizer": SMALL["tokenizer"], "device": "cpu"}
    show(compare(model(0), model(1), **common, **settings, **given), Console(file=out, width=110))
    assert said in out.getvalue()
    assert "the KL is" not in out.getvalue()
    out = io.StringIO()
    show(compare(model(0), model(0), **common, **settings, **given), Console(file=out, width=110))
    assert "the KL is 0: there is no share of it" in out.getvalue()


def test_an_older_measurement_is_replaced_whole(tmp_path: Path) -> None:
    found = compare(model(0), model(1), **SMALL)
    write(found, tmp_path / "out")
    (tmp_path / "out" / PAGE).write_text("of the older one")
    compare(model(0), model(1), **SMALL, out=tmp_path / "out")
    assert not (tmp_path / "out" / PAGE).exists()


def test_what_somebody_put_beside_a_measurement_is_not_lost(tmp_path: Path) -> None:
    compare(model(0), model(1), **SMALL, out=tmp_path / "out")
    (tmp_path / "out" / "analysis.ipynb").write_text("a week's work")
    with pytest.raises(UserError, match=r"out exists and holds 'analysis.ipynb', too, which the result"):
        compare(model(0), model(1), **SMALL, out=tmp_path / "out")
    assert (tmp_path / "out" / "analysis.ipynb").read_text() == "a week's work"


def test_a_folder_that_cannot_be_replaced_is_refused_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    for out in (".", tmp_path / "out"):
        with pytest.raises(UserError, match="the folder that this process works in, and cannot be replaced"):
            compare(model(0), model(1), **SMALL, out=out)
    compare(model(0), model(1), **SMALL, out="inside")
    assert read_summary(tmp_path / "out" / "inside")


@pytest.mark.parametrize(("confidence", "said"), [(0.95, "95%"), (0.999, "99.9%"), (0.57, "57%")])
def test_the_confidence_is_said_with_its_digits(tmp_path: Path, confidence: float, said: str) -> None:
    settings = {**SMALL, "confidence": confidence, "resamples": 2000}
    found = compare(model(0), model(1), **settings, out=tmp_path / "out")
    out = io.StringIO()
    show(found, Console(file=out, width=110))
    assert f"{said} interval" in out.getvalue()
    page = write_audit_page(tmp_path / "out").read_text(encoding="utf-8")
    assert f"{said}, {found.settings['resamples']:,} resamples" in page
    assert f"{said} interval" in page


def test_progress(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(progress_for(True), TerminalProgress)
    plain = progress_for(False)
    assert isinstance(plain, PlainProgress)
    now = 100.0
    monkeypatch.setattr("kedge.measure.progress.time.monotonic", lambda: now)
    plain.begin("given texts", 40, "sequences")
    now = 130.0
    plain.advance(10)
    plain.advance(10)
    assert capsys.readouterr().err.splitlines() == [
        "given texts: 40 sequences",
        "given texts: 10/40 sequences · 1:30 left",
    ]


def test_help_is_light() -> None:
    run = "from kedge.cli import main\ntry: main(['measure', '--help'])\n"
    code = f"import sys\n{run}finally: assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--fail-above" in done.stdout
