"""What has been scored outlives an interrupt or an error, wherever it comes."""

from __future__ import annotations

import copy
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pyarrow import parquet
from transformers import PreTrainedTokenizerBase

from kedge.cli import main
from kedge.errors import RunError, UserError
from kedge.measure import SUMMARY, TOKENS, MeasureConfig, compare, read_summary
from kedge.measure.progress import Silent
from kedge.tasks import sums
from tests.measure.test_bad_input import PROMPTS, here, measure, refused  # noqa: F401
from tests.measure.test_compare import BOTH, SMALL, model


def tokenizer(before: Callable[[], None]) -> PreTrainedTokenizerBase:
    """One that does something before it decodes, which happens once all is scored."""
    made = copy.deepcopy(sums.tokenizer())
    decode = made.decode

    def decoding(*given: Any, **options: Any) -> str:
        before()
        return str(decode(*given, **options))

    made.decode = decoding
    return made


def test_an_interrupt_while_figures_are_made(tmp_path: Path) -> None:
    presses = [lambda: os.kill(os.getpid(), signal.SIGINT)]
    asked = SMALL | {"tokenizer": tokenizer(lambda: presses.pop()() if presses else None)}
    found = compare(model(0), model(1), **asked, out=tmp_path / "out")
    assert not presses
    assert not found.partial
    assert (
        read_summary(tmp_path / "out")["questions"]
        == compare(model(0), model(1), **SMALL).summary()["questions"]
    )


def test_figures_that_cannot_be_made(tmp_path: Path) -> None:
    def fail() -> None:
        raise ValueError("no such id")

    out = tmp_path / "out"
    with pytest.raises(
        RunError, match=r"\(no such id\); the values of every scored token are in .*tokens.parquet"
    ):
        compare(model(0), model(1), **SMALL | {"tokenizer": tokenizer(fail)}, out=out)
    assert [path.name for path in out.iterdir()] == [TOKENS]
    kept = parquet.read_table(out / TOKENS).to_pydict()
    answers = compare(model(0), model(1), **SMALL).answers.values()
    assert kept["reverse_kl"] == torch.cat([answer.tokens.reverse_kl for answer in answers]).tolist()
    assert set(kept["question"]) == {"policy_responses", "reference_responses", "texts"}


class Failing(Silent):
    """Runs out of something after some parts."""

    def __init__(self, parts: int) -> None:
        self.left = parts

    def advance(self, count: int) -> None:
        self.left -= 1
        if self.left == 0:
            raise MemoryError("no memory left")


def test_an_error_amid_the_scoring(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(RunError, match=r"no memory left. What was scored before is in .*, labelled partial"):
        compare(model(0), model(1), **SMALL, batch=4, progress=Failing(7), out=out)
    summary = read_summary(out)
    assert summary["partial"]
    assert summary["notes"][0] == "failed before all was scored: no memory left"
    whole = compare(model(0), model(1), **SMALL, batch=4)
    assert summary["questions"]["policy_responses"] == whole.summary()["questions"]["policy_responses"]
    assert summary["questions"]["reference_responses"]["counts"]["prompts"] == 4
    with pytest.raises(MemoryError):  # nowhere to keep it
        compare(model(0), model(1), **SMALL, batch=4, progress=Failing(7))


def test_a_folder_that_cannot_be_made_is_refused_first(
    here: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Before the models are looked at, one of which is not there."""
    for out in ("prompts.jsonl/out", "/proc/out", "a" * 300):
        said = refused(capsys, "./absent", "reference", *PROMPTS, "--out", out)
        assert f"{out} cannot be written" in said
        assert "give another folder" in said
    assert {path.name for path in here.iterdir()} == {"policy", "reference", "prompts.jsonl", "texts.jsonl"}


@pytest.mark.parametrize("seed", [2**64, -1])
def test_a_seed_that_the_bootstrap_cannot_have(seed: int) -> None:
    with pytest.raises(UserError, match="must be from 0 to"):
        MeasureConfig(seed=seed)
    assert compare(model(0), model(1), **BOTH, max_new_tokens=4, seed=2**64 - 1)["texts"]["reverse_kl"] > 0


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C raises, even where the tests run in the background of a shell, which has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_while_the_page_is_written(
    here: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stopping(folder: Path) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr("kedge.report.write_audit_page", stopping)
        assert measure("policy", "reference", *PROMPTS, "--out", "out") == 130
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == "kedge: stopped at once; the figures are in out, `kedge report out` adds the page"
    assert not read_summary(here / "out")["partial"]
    assert main(["report", "out"]) == 0


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_before_anything_was_scored(
    here: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """While a model is loaded: nothing of resuming, which is for training."""

    def stopping(source: str, **options: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr("kedge.measure.models.load_model", stopping)
    assert measure("policy", "reference", *PROMPTS, "--out", "out") == 130
    assert capsys.readouterr().err.splitlines()[-1] == "kedge: stopped at once; nothing was kept"
    assert not (here / "out" / SUMMARY).exists()
