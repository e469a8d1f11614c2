"""What goes wrong outside the recipe: one clear error, no traceback, nothing lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from kedge.cli import main
from kedge.models import build_model, save_model
from kedge.tasks import prose, sums
from tests.training.small import GRPO, PROSE, REWARD, SFT, recipe

Change = Callable[[dict[str, Any], Path], None]


def run(config: dict[str, Any], folder: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    code = main(["train", str(file)])
    return code, capsys.readouterr().err


def rewarded(body: str, **more: Any) -> Change:
    def change(config: dict[str, Any], folder: Path) -> None:
        file = folder / "mine.py"
        file.write_text(f"def mine(prompts, completions, **columns):\n    {body}\n", encoding="utf-8")
        functions = [{"function": f"{file}:mine"}]
        config["stages"][0]["rewards"] = {"functions": functions, **more}

    return change


def data(text: str | None, name: str = "prompts.jsonl") -> Change:
    def change(config: dict[str, Any], folder: Path) -> None:
        if text is not None:
            (folder / name).write_text(text, encoding="utf-8")
        config["stages"][0]["data"] = {"path": str(folder / name)}

    return change


def stage(**settings: Any) -> Change:
    return lambda config, folder: config["stages"][0].update(settings)


def other_reference() -> Change:
    def change(config: dict[str, Any], folder: Path) -> None:
        model = build_model(
            len(prose.tokenizer()), hidden_size=32, layers=1, heads=2, context=48, pad_id=0, eos_id=1
        )
        save_model(model, prose.tokenizer(), folder / "reference")
        config["stages"][0]["reference"] = {"path": str(folder / "reference")}

    return change


def short(key: str) -> Change:
    """A reference or critic whose context ends before the longest response can."""

    def change(config: dict[str, Any], folder: Path) -> None:
        model = build_model(16, hidden_size=32, layers=1, heads=2, context=12, pad_id=0, eos_id=1)
        save_model(model, sums.tokenizer(), folder / "short")
        if key == "critic":
            config["stages"][0].update(method="ppo", name="ppo", critic={"model": str(folder / "short")})
        else:
            config["stages"][0][key] = {"path": str(folder / "short")}

    return change


def exact_room(config: dict[str, Any], folder: Path) -> None:
    """The policy's context of 48 is used up; a stop string takes no more of it."""
    data(json.dumps({"prompt": "1" * 40}) + "\n")(config, folder)
    model = build_model(16, hidden_size=32, layers=1, heads=2, context=47, pad_id=0, eos_id=1)
    save_model(model, sums.tokenizer(), folder / "short")
    config["stages"][0].update(reference={"path": str(folder / "short")})
    config["stages"][0]["rollout"] = {**GRPO["rollout"], "stop": ["+"]}


def model_without_end(config: dict[str, Any], folder: Path) -> None:
    tokenizer = sums.tokenizer()
    model = build_model(len(tokenizer), hidden_size=32, layers=1, heads=2, context=48)
    tokenizer.eos_token = None
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    save_model(model, tokenizer, folder / "endless")
    config["model"] = {"path": str(folder / "endless")}


def model_cut_short(config: dict[str, Any], folder: Path) -> None:
    model = build_model(16, hidden_size=32, layers=1, heads=2, context=48, pad_id=0, eos_id=1)
    save_model(model, sums.tokenizer(), folder / "cut")
    weights = folder / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    config["model"] = {"path": str(folder / "cut")}


def existing(config: dict[str, Any], folder: Path) -> None:
    (folder / "run").mkdir()


def in_the_way(config: dict[str, Any], folder: Path) -> None:
    (folder / "file").write_text("")
    config["out"] = str(folder / "file" / "run")


CASES: dict[str, tuple[Change, int, str]] = {
    "missing data file": (data(None), 2, "no such file"),
    "malformed line": (data('{"prompt": "1+1="}\n{"prompt": \n'), 2, "prompts.jsonl, line 2: not valid JSON"),
    "empty data": (data(""), 2, "prompts.jsonl"),
    "no prompt column": (data('{"question": "1+1="}\n'), 2, "no column 'prompt'"),
    "prompt too long": (data(json.dumps({"prompt": "1+" * 30}) + "\n"), 2, "beyond the model's context of 48"),
    "no room": (stage(rollout={"max_new_tokens": 64}), 2, "beyond the model's context of 48"),
    "unknown task": (stage(data={"task": "sumz"}), 2, "'sumz' is none of sums, prose"),
    "missing module": (
        stage(rewards={"functions": [{"function": "nowhere.at.all:mine"}]}), 2, "nowhere"),
    "missing function": (
        stage(rewards={"functions": [{"function": "kedge.tasks.sums:corect"}]}), 2, "correct"),
    "reward raises": (rewarded("raise KeyError('lost')"), 1, "KeyError"),
    "reward hangs": (rewarded("while True: pass", time_limit=0.2), 1, "0.2"),
    "reward gives NaN": (rewarded("return [float('nan')] * len(prompts)"), 1, "nan"),
    "reward gives too few": (rewarded("return [1.0]"), 1, "16"),
    "reward gives strings": (rewarded("return ['good'] * len(prompts)"), 1, "'good'"),
    "other vocabulary": (other_reference(), 2, "has another vocabulary than the policy"),
    "reference without room": (short("reference"), 2, "the reference has a context of 12 tokens, and prompt"),
    "critic without room": (short("critic"), 2, "the critic has a context of 12 tokens, and prompt"),
    "room to the last token": (
        exact_room, 2, "the reference has a context of 47 tokens, and prompt and response can have 48"),
    "missing reference": (stage(reference={"path": "no/such/model"}), 2, "no/such/model"),
    "missing model": (lambda config, folder: config.update(model={"path": "no/such/model"}), 2, "no/such/model"),
    "model without end": (model_without_end, 2, "end-of-text"),
    "corrupt model": (model_cut_short, 1, "its safetensors file is damaged"),
    "existing run": (existing, 2, "go on with it by resume=true"),
    "file in the way": (in_the_way, 2, "cannot be made"),
    "device": (lambda config, folder: config.update(device="cuda:9"), 2, "'cuda:9' cannot be used here"),
    "no model": (lambda config, folder: config.update(model={}), 2, "give path, or build and tokenizer"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize(("change", "status", "expected"), CASES.values(), ids=CASES.keys())
def test_one_clear_error(
    change: Change, status: int, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = recipe(tmp_path, {**GRPO, "evaluation": None})
    change(config, tmp_path)
    code, shown = run(config, tmp_path, capsys)
    assert code == status, shown
    assert expected in shown
    assert "Traceback" not in shown
    if "grpo: grpo" in shown:
        checkpoints = tmp_path / "run" / "grpo" / "checkpoints"
        assert [entry.name for entry in checkpoints.iterdir()] == ["step-000000.update-000"]


def test_dropping_reward_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = recipe(tmp_path, {**GRPO, "evaluation": None})
    body = "return [1 / (len(text) - 8) for text in completions]"
    rewarded(body, on_error="drop", max_consecutive_drops=99)(config, tmp_path)
    code, shown = run(config, tmp_path, capsys)
    assert code == 0, shown
    rows = [
        json.loads(line) for line in (tmp_path / "run" / "grpo" / "metrics.jsonl").read_text().splitlines()
    ]
    assert rows[0]["reward/unscorable_fraction"] > 0
    log = (tmp_path / "run" / "grpo" / "log.txt").read_text()
    assert "left out as unscorable: reward 'mine' raised ZeroDivisionError" in log
    assert "(prompt: " in log


KNOWN_CASES = {
    "prompts count too": ({"completion_only": False}, "true_log_prob is that of completions"),
    "one for all": (
        {"true_log_prob": "tests.training.test_bad_input:one"},
        "must return one log-probability",
    ),
    "above 0": (
        {"true_log_prob": "tests.training.test_bad_input:above"},
        "of at most 0, for each completion",
    ),
    "no function": ({"true_log_prob": "kedge.tasks.prose:tokenizer"}, "true_log_prob: TypeError"),
}


def one(prompts: list[str], completions: list[str]) -> list[float]:
    return [-1.0]


def above(prompts: list[str], completions: list[str]) -> list[float]:
    return [0.5] * len(prompts)


@pytest.mark.parametrize(("changes", "expected"), KNOWN_CASES.values(), ids=KNOWN_CASES.keys())
def test_bad_true_log_probs(
    changes: dict[str, Any], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stage = {**SFT, "true_log_prob": "kedge.tasks.prose:log_prob", **changes}
    stage = {**stage, "data": {"task": "prose"}, "evaluation": {"data": {"task": "prose"}, "every": 2}}
    code, shown = run(recipe(tmp_path, stage, model=PROSE), tmp_path, capsys)
    assert code == 2, shown
    assert expected in shown


PAIR = '{"prompt": "topic : sea", "chosen": "the sea .", "rejected": "the sailor ."}\n'

PAIR_CASES: dict[str, tuple[Change, str]] = {
    "equal texts": (
        data(PAIR + '{"prompt": "a", "chosen": "the", "rejected": "the"}\n', "pairs.jsonl"),
        "pairs.jsonl, line 2: 'chosen' and 'rejected' are the same text",
    ),
    "missing field": (data('{"prompt": "topic : sea", "chosen": "the"}\n', "pairs.jsonl"), "no column 'rejected'"),
    "empty": (data(PAIR.replace("the sea .", ""), "pairs.jsonl"), "pairs.jsonl, line 1: 'chosen' is empty"),
    "all too long": (stage(max_tokens=3), "every pair has a side longer than 3 tokens; raise max_tokens"),
    "task without pairs": (stage(data={"task": "sums"}), "task: sums has no preference pairs"),
    "no probability": (
        stage(true_preference="kedge.tasks.prose:tokenizer"), "true_preference: TypeError"),
    "probability above 1": (
        stage(true_preference="tests.training.test_bad_input:too_sure"), "must return one probability"),
    "missing path": (stage(path="./nowhere"), "reward model './nowhere': there is no such folder"),
}  # fmt: skip


def too_sure(prompts: list[str], chosen: list[str], rejected: list[str]) -> list[float]:
    return [1.5] * len(prompts)


@pytest.mark.parametrize(("change", "expected"), PAIR_CASES.values(), ids=PAIR_CASES.keys())
def test_bad_pairs(change: Change, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = recipe(tmp_path, dict(REWARD), model=PROSE)
    change(config, tmp_path)
    code, shown = run(config, tmp_path, capsys)
    assert code == 2, shown
    assert expected in shown
    assert "Traceback" not in shown
    assert not (tmp_path / "run").exists()


LATER: dict[str, tuple[Change, str]] = {
    "data": (data('{"prompt": "1+1="}\n{"prompt": \n'), "prompts.jsonl, line 2: not valid JSON"),
    "reward": (
        stage(rewards={"functions": [{"function": "kedge.tasks.sums:corect"}]}), "corect"),
    "column": (data('{"prompt": "1+1="}\n'), "needs the column 'answer'"),
    "reference": (other_reference(), "has another vocabulary than the policy"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "expected"), LATER.values(), ids=LATER.keys())
def test_a_later_stage_is_checked_before_the_first_trains(
    change: Change, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answered = {"functions": [{"function": "kedge.tasks.sums:correct"}]}
    config = recipe(tmp_path, {**GRPO, "rewards": answered, "evaluation": None}, dict(SFT))
    change(config, tmp_path)
    config["stages"].reverse()
    code, shown = run(config, tmp_path, capsys)
    assert code == 2, shown
    assert expected in shown
    assert not (tmp_path / "run").exists()


UNPRIVILEGED = 65534


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become an ordinary user")
def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    """As an ordinary user, in a folder of root's."""
    config = recipe(tmp_path, {**SFT, "evaluation": None})
    locked = tempfile.mkdtemp()
    Path(locked).chmod(0o755)
    config["out"] = f"{locked}/run"
    code = (
        "import json, os, sys\n"
        "from kedge.api import train\n"
        "from kedge.errors import UserError\n"
        "import kedge.training.stages\n"
        f"os.setuid({UNPRIVILEGED})\n"
        "try:\n    train(json.loads(sys.argv[1]))\n"
        "except UserError as error:\n    print(error); sys.exit(2)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, json.dumps(config)], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "cannot be made (Permission denied)" in done.stdout


def test_no_space_left_while_saving(tmp_path: Path) -> None:
    """A limit on file size is what a full disk is to a writer: the write fails part of the way."""
    config = recipe(tmp_path, {**SFT, "steps": 6, "checkpoint": {"every": 2}, "evaluation": None})
    code = (
        "import json, resource, signal, sys\n"
        "import kedge.api, kedge.training.stages\n"
        "from kedge.cli import main\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "limit = int(sys.argv[2])\n"
        "if limit: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))\n"
        "sys.exit(main(['train', sys.argv[1], *sys.argv[3:]]))\n"
    )
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")

    def child(limit: int, *more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", code, str(file), str(limit), *more]
        return subprocess.run(command, capture_output=True, text=True)

    full = child(20_000)
    assert full.returncode == 1, full.stderr
    assert "File too large" in full.stderr
    assert "free some space" in full.stderr
    assert "Traceback" not in full.stderr
    stage_folder = tmp_path / "run" / "sft"
    assert not list((stage_folder / "checkpoints").glob("step-*"))
    resumed = child(0, "resume=true")
    assert resumed.returncode == 0, resumed.stderr
    rows = [json.loads(line)["step"] for line in (stage_folder / "metrics.jsonl").read_text().splitlines()]
    assert rows == [1, 2, 3, 4, 5, 6]
