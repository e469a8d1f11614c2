"""What cannot be measured: one clear error each, through the command."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from kedge.cli import main
from kedge.errors import UserError
from kedge.measure import MeasureConfig, compare
from kedge.models import build_model, save_model, train_bpe
from kedge.tasks import sums
from tests.measure.test_compare import model


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two models, prompts and texts; the working folder."""
    for name, seed in (("policy", 0), ("reference", 1)):
        save_model(model(seed), sums.tokenizer(), tmp_path / name)
    write(tmp_path / "prompts.jsonl", [{"prompt": f"{n}+1="} for n in range(9)])
    write(tmp_path / "texts.jsonl", [{"text": f"{n}+1={n + 1}"} for n in range(9)])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(path: Path, rows: list[Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def measure(*arguments: str, responses: int = 1) -> int:
    sampling = ["--max-new-tokens", "4", "--responses", str(responses)] if "--prompts" in arguments else []
    return main(["measure", *arguments, "--device", "cpu", *sampling])


def refused(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 2) -> str:
    assert measure(*arguments) == status
    said = capsys.readouterr().err.strip().splitlines()
    assert said[-1].startswith("kedge: "), said
    assert not any("Traceback" in line for line in said)
    return said[-1]


PROMPTS = ("--prompts", "prompts.jsonl")


def test_a_missing_model(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "policy: model './absent': there is no such folder" in refused(
        capsys, "./absent", "reference", *PROMPTS
    )
    assert "reference" in refused(capsys, "policy", "./absent", *PROMPTS)


def test_tokenizers_that_differ(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(build_model(260, hidden_size=8, layers=1, heads=2), train_bpe(["a b"], 258), here / "other")
    said = refused(capsys, "other", "reference", *PROMPTS)
    assert "the tokenizers differ: the policy has 258 entries, not 16; for example ' '" in said


@pytest.mark.parametrize("side", ["policy", "reference"])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_damaged_tokenizer(here: Path, capsys: pytest.CaptureFixture[str], side: str, name: str) -> None:
    """Not the other model's in its place."""
    (here / side / name).write_text((here / side / name).read_text()[:100])
    said = refused(capsys, "policy", "reference", *PROMPTS, status=1)
    assert f"{side}: {side}/{name}: damaged (" in said
    assert said.endswith("copy or download it again")


@pytest.mark.parametrize("side", ["policy", "reference"])
def test_a_tokenizer_that_is_not_there(here: Path, capsys: pytest.CaptureFixture[str], side: str) -> None:
    for file in (here / side).glob("*token*"):
        file.unlink()
    assert measure("policy", "reference", *PROMPTS, "--out", "out") == 0
    other = {"policy": "reference", "reference": "policy"}[side]
    (note,) = json.loads((here / "out" / "measure.json").read_text())["notes"]
    assert note.startswith(f"the {side} has no tokenizer of its own (tokenizer '{side}': the folder has no")
    assert note.endswith(f"the {other}'s is used for both")
    (here / side / "tokenizer.json").write_text("{}")
    assert f"{side}: tokenizer '{side}' cannot be loaded" in refused(capsys, "policy", "reference", *PROMPTS)
    (here / side / "tokenizer.json").unlink()
    for file in (here / other).glob("*token*"):
        file.unlink()
    assert "neither model has a tokenizer (" in refused(capsys, "policy", "reference", *PROMPTS)


def test_empty_prompts(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "none.jsonl").write_text("")
    assert "none.jsonl: no rows in it" in refused(capsys, "policy", "reference", "--prompts", "none.jsonl")
    write(here / "empty.jsonl", [{"prompt": "1+1="}, {"prompt": ""}])
    said = refused(capsys, "policy", "reference", "--prompts", "empty.jsonl")
    assert "empty.jsonl, line 2: the prompt is empty" in said
    write(here / "short.jsonl", [{"text": "1"}])
    said = refused(capsys, "policy", "reference", "--texts", "short.jsonl")
    assert "short.jsonl, line 1: the text has a single token" in said
    assert "--prompts, --texts, or both" in refused(capsys, "policy", "reference")


def test_a_prompt_beyond_the_context(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(here / "long.jsonl", [{"prompt": "1+1="}, {"prompt": "1" * 45}])
    said = refused(capsys, "policy", "reference", "--prompts", "long.jsonl")
    assert "long.jsonl, line 2: the prompt has 45 tokens" in said
    assert "context of 48" in said
    assert "lower max_new_tokens" in said


def test_a_text_without_its_column(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(here / "other.jsonl", [{"body": "1+1=2"}])
    said = refused(capsys, "policy", "reference", "--texts", "other.jsonl")
    assert "other.jsonl, line 1: no text in column 'text'; its columns: body" in said
    assert measure("policy", "reference", "--texts", "other.jsonl", "--text-column", "body") == 0


def test_a_corrupt_file(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = here / "policy" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    said = refused(capsys, "policy", "reference", *PROMPTS, status=1)
    assert "policy: model 'policy': its safetensors file is damaged" in said


def test_weights_that_are_not_numbers(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = model(0)
    with torch.no_grad():
        broken.model.norm.weight[0] = math.nan
    save_model(broken, sums.tokenizer(), here / "diverged")
    said = refused(capsys, "diverged", "reference", *PROMPTS)
    assert "policy: LlamaForCausalLM 'diverged': model.norm.weight holds NaN or infinity" in said
    assert said.endswith("take an earlier checkpoint")


def test_a_folder_that_is_taken(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert measure("policy", "reference", *PROMPTS) == 0
    out = here / "runs" / "measure-policy-reference"
    assert (out / "measure.json").is_file()
    assert "exists already: give another --out, or --overwrite" in refused(
        capsys, "policy", "reference", *PROMPTS
    )
    assert measure("policy", "reference", *PROMPTS, "--overwrite") == 0
    (here / "mine").mkdir()
    said = refused(capsys, "policy", "reference", *PROMPTS, "--overwrite", "--out", "mine")
    assert "mine exists already: give another --out" in said


def test_a_gate(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        measure("policy", "reference", "--texts", "texts.jsonl", "--fail-above", "0.001", "--out", "a") == 3
    )
    assert "is above --fail-above 0.001" in capsys.readouterr().err
    assert (here / "a" / "measure.json").is_file()
    assert measure("policy", "policy", "--texts", "texts.jsonl", "--fail-above", "0.001", "--out", "b") == 0


@pytest.mark.parametrize("command", ["measure", "report"])
def test_a_reader_who_leaves_early(here: Path, command: str) -> None:
    """As ``| head`` does: the page is written, and the gate's verdict is the command's status."""
    measured = ("policy", "reference", "--texts", "texts.jsonl", "--out", "out", "--device", "cpu")
    gated = [*measured, "--fail-above", "0.001"]
    if command == "report":
        assert main(["measure", *measured]) == 0
        (here / "out" / "measure.html").unlink()
    read, write_end = os.pipe()
    os.close(read)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "kedge.cli", command, *(gated if command == "measure" else ["out"])],
            stdout=write_end,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
    finally:
        os.close(write_end)
    assert done.returncode == (3 if command == "measure" else 0), done.stderr
    assert "Traceback" not in done.stderr
    assert "Broken pipe" not in done.stderr
    assert (here / "out" / "measure.html").is_file()


def test_a_split_of_a_dataset(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    datasets = pytest.importorskip("datasets")
    for name, folder in (("prompt", "asked"), ("text", "read")):
        rows = datasets.Dataset.from_list([{name: f"{n}+1="} for n in range(4)])
        datasets.DatasetDict({"train": rows, "test": rows.select([1])}).save_to_disk(str(here / folder))
    pair = ("policy", "reference")
    assert "which split? Set split to one of train, test" in refused(capsys, *pair, "--prompts", "asked")
    assert measure(*pair, "--prompts", "asked", "--texts", "texts.jsonl", "--split", "test") == 0
    summary = json.loads((here / "runs/measure-policy-reference/measure.json").read_text())
    questions = summary["questions"]
    assert questions["policy_responses"]["counts"]["prompts"] == 1
    assert questions["texts"]["counts"]["texts"] == 9
    said = refused(capsys, *pair, *PROMPTS, "--split", "test", "--out", "out")
    assert "split (--split) acts on datasets alone, and there are none" in said


def test_an_adapter_without_peft(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "adapter").mkdir()
    config = {"peft_type": "LORA", "base_model_name_or_path": "reference"}
    (here / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    try:
        import peft  # noqa: F401
    except ImportError:
        said = refused(capsys, "adapter", "reference", *PROMPTS)
        assert "reading it needs peft, which is not installed: pip install 'kedge[peft]'" in said
    else:
        assert "without adapter_model.safetensors" in refused(capsys, "adapter", "reference", *PROMPTS)


def test_interrupted(here: Path) -> None:
    """Ctrl-C at the command: files labelled partial, exit status 130."""
    code = (
        "import os, signal, sys\n"
        "from kedge.measure import progress\n"
        "class Stopping(progress.Silent):\n"
        "    def advance(self, count):\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "progress.progress_for = Stopping\n"
        "from kedge.cli import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    command = [
        sys.executable,
        "-c",
        code,
        "measure",
        "policy",
        "reference",
        *PROMPTS,
        "--batch",
        "8",
        "--out",
        "out",
    ]
    done = subprocess.run(
        [*command, "--max-new-tokens", "4"],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 130, done.stderr
    assert "PARTIAL" in done.stdout
    assert json.loads((here / "out" / "measure.json").read_text())["partial"] is True


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"temperature": 0.0}, "a KL along greedy responses estimates nothing"),
        ({"responses": 0}, "responses = 0 must be at least 1"),
        ({"confidence": 95.0}, "must be between 0 and 1"),
        ({"width": 0.0}, "width = 0.0 must be above 0"),
        ({"count": 0}, "count = 0 must be at least 1"),
        ({"dtype": "float16"}, "dtype = 'float16' is none of"),
        ({"resamples": 1}, "resamples = 1 must be at least 40"),
        ({"resamples": 199, "confidence": 0.99}, "must be at least 200"),
    ],
)
def test_settings(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(UserError, match=match):
        MeasureConfig(**settings)


@pytest.mark.parametrize(
    ("data", "setting", "said"),
    [
        ("texts", ("--responses", "8"), "responses (--responses) acts on prompts alone, and there are none"),
        ("texts", ("--from", "policy"), "sample_from (--from) acts on prompts alone"),
        ("texts", ("--max-new-tokens", "4"), "max_new_tokens (--max-new-tokens) acts on prompts alone"),
        ("texts", ("--prompt-format", "{text}"), "prompt (--prompt-format) acts on prompts alone"),
        (
            "prompts",
            ("--text-column", "body"),
            "text (--text-column) acts on texts alone, and there are none",
        ),
    ],
)
def test_settings_that_would_do_nothing(
    here: Path, capsys: pytest.CaptureFixture[str], data: str, setting: tuple[str, str], said: str
) -> None:
    assert said in refused(capsys, "policy", "reference", f"--{data}", f"{data}.jsonl", *setting)
    measured = ("--prompts", "prompts.jsonl", "--texts", "texts.jsonl", "--out", "out")
    write(here / "texts.jsonl", [{"text": "1+1=2", "body": "2+2=4"}])
    settings = ("--prompt-format", "{prompt}") if setting[0] == "--prompt-format" else setting
    assert measure("policy", "reference", *measured, *settings) == 0  # where it acts


def test_temperature_acts_on_texts() -> None:
    given: dict[str, Any] = {"texts": ["1+2=3"], "tokenizer": sums.tokenizer(), "device": "cpu"}
    cold, hot = (compare(model(0), model(1), **given, temperature=each)["texts"] for each in (1.0, 4.0))
    assert hot["policy_entropy"] > cold["policy_entropy"]
    assert hot["reverse_kl"] < cold["reverse_kl"]


def test_objects_that_do_not_fit() -> None:
    with pytest.raises(UserError, match="nothing to compare the models on"):
        compare(model(0), model(1), tokenizer=sums.tokenizer())
    with pytest.raises(UserError, match="neither model has a tokenizer"):
        compare(model(0), model(1), texts=["1+1"])
    with pytest.raises(UserError, match="dtype does nothing for models that are in memory"):
        compare(model(0), model(1), texts=["1+1"], tokenizer=sums.tokenizer(), dtype="float64")
    with pytest.raises(UserError, match="low_memory does nothing for a model that is in memory"):
        compare(model(0), model(1), texts=["1+1"], tokenizer=sums.tokenizer(), low_memory=True)
    with pytest.raises(
        UserError, match=r"policy: the tokenizer's ids go up to 15, the model's vocabulary 8 rows"
    ):
        compare(
            build_model(8, hidden_size=8, layers=1, heads=2),
            model(1),
            texts=["1"],
            tokenizer=sums.tokenizer(),
        )
    with pytest.raises(UserError, match=r"the reference is on meta, the comparison on cpu.*device='meta'"):
        compare(model(0), model(1).to("meta"), texts=["1+1"], tokenizer=sums.tokenizer())
    with pytest.raises(UserError, match="backend is 'fast'; it must be one of"):
        compare(model(0), model(1), texts=["1+1"], tokenizer=sums.tokenizer(), backend="fast")
    assert torch.is_grad_enabled()


def test_a_folder_of_other_things_is_not_replaced(tmp_path: Path) -> None:
    """Least of all the model's own."""
    tokenizer = sums.tokenizer()
    save_model(model(0), tokenizer, tmp_path / "tuned")
    before = sorted(path.name for path in (tmp_path / "tuned").iterdir())
    texts = {"texts": ["1+2=3"], "device": "cpu", "out": tmp_path / "tuned"}
    with pytest.raises(UserError, match="holds no measurement, which the result would replace"):
        compare(str(tmp_path / "tuned"), str(tmp_path / "tuned"), **texts)
    assert sorted(path.name for path in (tmp_path / "tuned").iterdir()) == before


def test_a_figure_that_is_not_a_number_is_above_any_limit() -> None:
    found = compare(model(0), model(1), texts=["1+2=3"], prompts=["1+2="], tokenizer=sums.tokenizer(),
                    max_new_tokens=4, device="cpu")  # fmt: skip
    last = list(found.answers.values())[-1]
    name = last.question.headline[-1]
    last.figures.estimates[name] = dataclasses.replace(last.figures.estimates[name], value=math.nan)
    assert math.isnan(found.largest())
