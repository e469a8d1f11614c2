"""Killed and resumed: every later metric equals the uninterrupted run's to the last bit."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import kedge
from kedge.errors import RunError, UserError
from kedge.models import build_model, save_model
from kedge.runs import load_state, read_metrics, read_samples, save_state
from kedge.tasks import sums
from kedge.training.checkpoint import Moment
from kedge.training.gather import Gatherer
from kedge.training.policy import PolicyWork
from tests.training.small import GRPO, MODEL, PPO, REWARD, SFT, recipe, without_clock

PAIRS = Path(__file__).with_name("pairs.jsonl")
STAGES = (
    {**SFT, "steps": 6, "checkpoint": {"every": 2}},
    {**REWARD, "data": {"path": str(PAIRS)}, "true_preference": None, "evaluation": None},
    {**GRPO, "steps": 8, "epochs": 2, "minibatches": 2, "checkpoint": {"every": 3}},
    {
        **PPO,
        "start": "sft",
        "steps": 6,
        "checkpoint": {"every": 2},
        "trust_region": {"penalty": {"beta": 0.01, "target": 1e-3}},
        "critic": {"model": "scores", "optimizer": {"learning_rate": 3e-3}, "clip": 1.0},
    },
)
NAMES = [str(stage["name"]) for stage in STAGES]

CHILD = """
import json, os, sys
import kedge, kedge.api
from kedge.training import PlainProgress
import kedge.training.stages
config = json.loads(sys.argv[1])
kedge.train(config)
"""


def start(config: dict[str, Any]) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", CHILD, json.dumps(config)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)


def finish(config: dict[str, Any]) -> None:
    child = start(config)
    _, shown = child.communicate(timeout=300)
    assert child.returncode == 0, shown.decode()


def traces(folder: Path) -> dict[str, list[dict[str, Any]]]:
    return {name: without_clock(read_metrics(folder / "run" / name)) for name in NAMES}


def lines(folder: Path) -> int:
    files = [folder / "run" / name / "metrics.jsonl" for name in NAMES]
    return sum(file.read_bytes().count(b"\n") for file in files if file.exists())


def writing(folder: Path) -> bool:
    """Whether a checkpoint is being written at this moment."""
    return any(any((folder / "run" / name / "checkpoints").glob(".*.partial")) for name in NAMES)


def kill_and_resume(folder: Path, at: int | str, delay: float) -> None:
    """Kill -9 once ``at`` lines of metrics are there, or while a checkpoint is being written; then resume."""
    config = recipe(folder, *STAGES)
    child = start(config)
    deadline = time.monotonic() + 120
    while child.poll() is None and time.monotonic() < deadline:
        if writing(folder) if at == "checkpoint" else lines(folder) >= int(at):
            break
    time.sleep(delay)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    reached = {name: checkpoint_steps(folder, name) for name in NAMES}
    done = {name: rows_done(folder, name) for name in NAMES}
    for stage in STAGES:
        name = str(stage["name"])
        if done[name]:
            assert done[name] - max(reached[name], default=0) <= stage["checkpoint"]["every"]
    finish({**config, "resume": True})


def checkpoint_steps(folder: Path, name: str) -> list[int]:
    found = (Moment.parse(entry.name) for entry in (folder / "run" / name / "checkpoints").glob("step-*"))
    return [moment.step for moment in found if moment is not None]


def rows_done(folder: Path, name: str) -> int:
    file = folder / "run" / name
    return max((int(row["step"]) for row in read_metrics(file)), default=0) if file.is_dir() else 0


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    finish(recipe(folder, *STAGES))
    return folder


def check(folder: Path, whole: Path) -> None:
    betas = [row["trust_region/beta"] for row in traces(whole)["ppo"][1:]]
    assert betas[0] != betas[2]  # moved by the first checkpoint: one that is not restored is seen
    assert repr(traces(folder)) == repr(traces(whole))
    for name in NAMES:
        ours, theirs = (
            load_file(place / "run" / name / "model" / "model.safetensors") for place in (folder, whole)
        )
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
        assert read_samples(folder / "run" / name) == read_samples(whole / "run" / name)
    for name in NAMES[1:]:
        assert repr(last_state(folder, name)) == repr(last_state(whole, name))


def last_state(folder: Path, name: str) -> Any:
    """Critic, both optimizers, both β: all that the last checkpoint holds, tensors by the hash of their bits."""

    def hashed(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return hashlib.sha256(value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
        if isinstance(value, dict):
            return {key: hashed(entry) for key, entry in value.items()}
        return [hashed(entry) for entry in value] if isinstance(value, list | tuple) else value

    return hashed(load_state((folder / "run" / name / "model").resolve().parent))


@pytest.mark.parametrize("at", [pytest.param(15, marks=pytest.mark.acceptance), "checkpoint"])
def test_killed(at: int | str, whole: Path, tmp_path: Path) -> None:
    kill_and_resume(tmp_path, at, delay=0.0)
    check(tmp_path, whole)


@pytest.mark.acceptance
@pytest.mark.parametrize("moment", range(20))
def test_killed_at_twenty_moments(moment: int, whole: Path, tmp_path: Path) -> None:
    """Five while a checkpoint is written, fifteen after a random line and a random delay."""
    draw = random.Random(moment)
    kill_and_resume(tmp_path, "checkpoint" if moment < 5 else draw.randrange(0, 27), draw.random() * 0.2)
    check(tmp_path, whole)


@pytest.mark.parametrize("base", [GRPO, PPO], ids=["grpo", "ppo"])
def test_stopped_inside_a_step_with_rollouts_in_hand(base: dict[str, Any], tmp_path: Path) -> None:
    """SIGTERM from a reward function: the update at hand ends, the responses in hand are saved and used."""
    stop = tmp_path / "stop.py"
    stop.write_text(
        "import os, pathlib, signal\n"
        "def stop(prompts, completions, **columns):\n"
        f"    flag = pathlib.Path({str(tmp_path / 'flag')!r})\n"
        "    if flag.exists() and len(flag.read_text()) == 2:\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "    if flag.exists():\n        flag.write_text(flag.read_text() + 'x')\n"
        "    return [float(sum(c.isdigit() for c in text)) for text in completions]\n",
        encoding="utf-8",
    )
    traced = []
    for name, interrupted in (("whole", False), ("stopped", True)):
        folder = tmp_path / name
        folder.mkdir()
        stage = {**base, "epochs": 2, "minibatches": 2, "evaluation": None, "old_kl_limit": 10.0, "steps": 4}
        method = str(stage["name"])
        stage["rewards"] = {"functions": [{"function": f"{stop}:stop"}]}
        config = recipe(folder, stage)
        if interrupted:
            (tmp_path / "flag").write_text("")
            with pytest.raises(RunError, match="stopped as asked"):
                kedge.train(config)
            (tmp_path / "flag").unlink()
            saved = sorted(entry.name for entry in (folder / "run" / method / "checkpoints").iterdir())
            assert "step-000002.update-000" in saved
            leave_rows_behind(folder / "run" / method)
            config["resume"] = True
        kedge.train(config)
        traced.append((without_clock(read_metrics(folder / "run" / method)), last_state(folder, method)))
        assert read_samples(folder / "run" / method) == []
    assert repr(traced[0]) == repr(traced[1])


def leave_rows_behind(stage: Path) -> None:
    """What a process that went on from a checkpoint inside step 3, and was killed later, would have left."""
    with (stage / "metrics.jsonl").open("a") as metrics, (stage / "samples.jsonl").open("a") as samples:
        for step in (3, 4):
            metrics.write(json.dumps({"step": step, "reward/mean": 0.0}) + "\n")
            samples.write(json.dumps({"step": step, "kind": "evaluation", "completion": "1"}) + "\n")
        samples.write(json.dumps({"step": 3, "kind": "skipped", "update": 1, "completion": "1"}) + "\n")


CONTROLLERS: dict[str, dict[str, Any]] = {
    "fixed": {"kind": "fixed", "beta": 0.25},
    "budget": {"kind": "budget", "budget": 0.05, "beta": 0.5},
    "adaptive": {"kind": "adaptive", "target": 0.05, "beta": 0.75},
}


@pytest.mark.parametrize(("before", "after"), [
    ("fixed", "budget"), ("budget", "fixed"), ("budget", "adaptive"), ("adaptive", "budget"), ("fixed", "fixed"),
])  # fmt: skip
def test_another_controller_on_resume_begins_with_its_own_beta(
    before: str, after: str, tmp_path: Path
) -> None:
    """A fixed β too: seen to stay what the checkpoint held, while the run said that it had changed."""
    start = {"kind": "fixed", "beta": 0.0} if before == after else CONTROLLERS[before]
    for controller, steps in ((start, 1), (CONTROLLERS[after], 2)):
        stage = {**GRPO, "evaluation": None, "steps": steps, "anchor": {"controller": controller}}
        rows = kedge.train(recipe(tmp_path, stage, resume=steps == 2)).stages["grpo"].metrics
    assert rows[-1]["anchor/beta"] == pytest.approx(CONTROLLERS[after]["beta"])


def test_a_penalty_may_be_added_on_resume(tmp_path: Path) -> None:
    for steps, region in ((1, {}), (2, {"penalty": {"beta": 0.5}}), (3, {"penalty": {"beta": 0.25}})):
        stage = {**GRPO, "evaluation": None, "steps": steps, "epochs": 2, "trust_region": region}
        rows = kedge.train(recipe(tmp_path, stage, resume=steps > 1)).stages["grpo"].metrics
    assert [row.get("trust_region/beta") for row in rows] == [None, 0.5, 0.25]


def stop_after(updates: int, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Send this process SIGTERM once a step has had so many updates."""
    real_update, real_gather = PolicyWork._update, Gatherer.gather

    def update(self: PolicyWork, at: int, experience: Any) -> bool:
        done = real_update(self, at, experience)
        if at == step and len(self.updates) == updates:
            os.kill(os.getpid(), signal.SIGTERM)
        return done

    def gather(self: Gatherer, at: int, loss: Any) -> Any:
        found = real_gather(self, at, loss)
        if at == step and updates == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return found

    monkeypatch.setattr(PolicyWork, "_update", update)
    monkeypatch.setattr(Gatherer, "gather", gather)


SEQUENCE = {"kind": "sequence", "low": 0.01, "high": 0.01}
MORE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "limit": ({}, {"epochs": 2, "old_kl_limit": 10.0}),
    "mask": ({}, {"epochs": 2, "trust_region": {"mask": {"threshold": 0.5}}}),
    "correction": ({}, {"correction": {"kind": "truncate"}}),
    "forward": ({"epochs": 2}, {"epochs": 2, "anchor": {"direction": "forward", **GRPO["anchor"]}}),
    "sequence": (
        {"epochs": 2, "trust_region": SEQUENCE},
        {"epochs": 2, "trust_region": SEQUENCE, "anchor": {"gradient": "sequence", **GRPO["anchor"]}},
    ),
}


@pytest.mark.parametrize(("before", "after"), MORE.values(), ids=MORE.keys())
def test_responses_in_hand_are_scored_for_what_is_asked_for_now(
    before: dict[str, Any], after: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped before the step's first update: the responses stay, whatever the settings were."""
    stage = {**GRPO, "evaluation": None, "steps": 3}
    (tmp_path / "whole").mkdir()
    whole = kedge.train(recipe(tmp_path / "whole", {**stage, **before})).stages["grpo"].metrics
    with monkeypatch.context() as patched:
        stop_after(0, 1, patched)
        with pytest.raises(RunError, match="stopped as asked"):
            kedge.train(recipe(tmp_path, {**stage, **before}))
    rows = kedge.train(recipe(tmp_path, {**stage, **after}, resume=True)).stages["grpo"].metrics
    assert [row["step"] for row in rows] == [1, 2, 3]
    for name in ("reward/mean", "length/mean", "kl/policy_reference/k1"):
        assert rows[1][name] == whole[1][name]


@pytest.mark.parametrize("change", [
    {"old_kl_limit": 10.0}, {"anchor": {"direction": "forward", **GRPO["anchor"]}},
    {"correction": {"kind": "truncate"}},
], ids=str)  # fmt: skip
def test_a_half_done_step_is_finished_before_more_is_asked_of_it(
    change: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = {**GRPO, "evaluation": None, "steps": 3, "epochs": 2}
    for step in (1, 2):
        with monkeypatch.context() as patched:
            stop_after(2 - step, step, patched)
            with pytest.raises(RunError, match="stopped as asked"):
                kedge.train(recipe(tmp_path, stage, resume=step == 2))
        more = recipe(tmp_path, {**stage, **change}, resume=True)
        if step == 1:
            with pytest.raises(
                UserError, match="stopped within step 2, whose responses were scored for other"
            ):
                kedge.train(more)
    rows = kedge.train(more).stages["grpo"].metrics
    assert [row["step"] for row in rows] == [1, 2, 3]


def test_another_unit_begins_with_its_own_beta(tmp_path: Path) -> None:
    for steps, unit in ((1, "nats/token"), (2, "nats/response")):
        controller = {"kind": "budget", "budget": 0.05, "unit": unit}
        stage = {**GRPO, "evaluation": None, "steps": steps, "anchor": {"controller": controller}}
        rows = kedge.train(recipe(tmp_path, stage, resume=steps == 2)).stages["grpo"].metrics
    assert [row["anchor/beta"] for row in rows] == pytest.approx([1.0, 0.1])


def test_what_a_second_stop_has_in_hand_is_saved_too(tmp_path: Path) -> None:
    """Groups drawn again, round after round: the checkpoint before the first update is written anew at each stop."""
    reward = tmp_path / "fragile.py"
    head = "calls = 0\ndef fragile(prompts, completions, **columns):\n    global calls\n    calls += 1\n"
    good = "    return [float(c[:1] in '0123') * (i < 4) for i, c in enumerate(completions)]\n"
    fails = "    if calls == {}: raise KeyError('out of luck')\n"
    drawn = []
    for name, failures in (("whole", ()), ("broken", (2, 2))):
        folder = tmp_path / name
        folder.mkdir()
        rollout = {**GRPO["rollout"], "resample_equal_groups": 4}
        stage = {**GRPO, "evaluation": None, "steps": 1, "rollout": rollout}
        stage["rewards"] = {"functions": [{"function": f"{reward}:fragile"}]}
        for attempt, call in enumerate(failures):
            reward.write_text(head + fails.format(call) + good, encoding="utf-8")
            with pytest.raises(RunError, match="out of luck"):
                kedge.train(recipe(folder, stage, resume=attempt > 0))
            (state,) = (folder / "run" / "grpo" / "checkpoints").iterdir()
            drawn.append(load_state(state)["work"]["collector"]["position"])
        reward.write_text(head + good, encoding="utf-8")
        run = kedge.train(recipe(folder, stage, resume=bool(failures))).stages["grpo"]
        drawn.append(without_clock(run.metrics))
    assert drawn[0] == drawn[3]
    assert drawn[1] < drawn[2]


def test_a_checkpoint_of_another_version_is_refused(tmp_path: Path) -> None:
    stage = {**SFT, "steps": 1, "evaluation": None}
    kedge.train(recipe(tmp_path, stage))
    (checkpoint,) = (tmp_path / "run" / "sft" / "checkpoints").glob("step-*")
    save_state(checkpoint, {**load_state(checkpoint), "format": 1})
    with pytest.raises(UserError, match="another version of Kedge wrote this checkpoint"):
        kedge.train(recipe(tmp_path, {**stage, "steps": 2}, resume=True))


def test_a_folder_that_holds_nothing_but_a_lock_is_gone_on_with(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").touch()
    stage = {**SFT, "steps": 1, "evaluation": None}
    assert kedge.train(recipe(tmp_path, stage, resume=True)).stages["sft"].metrics


def test_a_failing_reward_loses_no_responses(tmp_path: Path) -> None:
    """The responses whose reward failed are in the checkpoint; resumed with a mended function, they are used."""
    reward = tmp_path / "fragile.py"
    good = "    return [float(sum(c.isdigit() for c in text)) for text in completions]\n"
    head = "calls = 0\ndef fragile(prompts, completions, **columns):\n    global calls\n    calls += 1\n"
    traced = []
    for name, body in (
        ("whole", good),
        ("broken", "    if calls == 3: raise KeyError('out of luck')\n" + good),
    ):
        folder = tmp_path / name
        folder.mkdir()
        reward.write_text(head + body, encoding="utf-8")
        stage = {**GRPO, "evaluation": None, "rewards": {"functions": [{"function": f"{reward}:fragile"}]}}
        config = recipe(folder, stage)
        if name == "broken":
            with pytest.raises(RunError, match="fragile"):
                kedge.train(config)
            assert "out of luck" in (folder / "run" / "grpo" / "log.txt").read_text()
            reward.write_text(head + good, encoding="utf-8")
            config["resume"] = True
        kedge.train(config)
        traced.append(without_clock(read_metrics(folder / "run" / "grpo")))
    assert repr(traced[0]) == repr(traced[1])


FRAGILE = """
import pathlib
def fragile(prompts, completions, **columns):
    if len(prompts) == 8 and pathlib.Path({flag!r}).read_text() == "evaluation " + str(seen()):
        raise KeyError("out of luck")
    return [float(sum(c.isdigit() for c in text)) for text in completions]
def seen():
    global evaluations
    evaluations += 1
    return evaluations
evaluations = 0
"""


@pytest.mark.parametrize(("base", "which", "saved"), [
    (GRPO, 2, "step-000001.update-001"), (PPO, 2, "step-000001.update-004"), (PPO, 3, "step-000003.update-004"),
], ids=["grpo", "ppo", "ppo at the end"])  # fmt: skip
def test_a_step_whose_evaluation_failed_is_recorded_on_resume(
    base: dict[str, Any], which: int, saved: str, tmp_path: Path
) -> None:
    """Its updates are not done twice; row, samples, best step and last checkpoint are those of an unbroken run."""
    flag, reward = tmp_path / "flag", tmp_path / "fragile.py"
    reward.write_text(FRAGILE.format(flag=str(flag)), encoding="utf-8")
    stage = {**base, "rewards": {"functions": [{"function": f"{reward}:fragile"}]}}
    traced = []
    for name, broken in (("whole", 0), ("broken", which)):
        folder = tmp_path / name
        folder.mkdir()
        flag.write_text(f"evaluation {broken}", encoding="utf-8")
        config = recipe(folder, stage)
        if broken:
            with pytest.raises(RunError, match="out of luck"):
                kedge.train(config)
            checkpoints = folder / "run" / str(stage["name"]) / "checkpoints"
            assert max(each.name for each in checkpoints.glob("step-*")) == saved
            flag.write_text("never", encoding="utf-8")
            config["resume"] = True
        run = kedge.train(config).stages[str(stage["name"])]
        state = last_state(folder, run.name)
        traced.append((without_clock(run.metrics), run.samples, state))
    assert [row["step"] for row in traced[1][0]] == [0, 1, 2, 3, 4]
    assert repr(traced[0]) == repr(traced[1])


def test_finished_run_is_left_as_it_is(tmp_path: Path) -> None:
    config = recipe(tmp_path)
    before = kedge.train(config).stages["grpo"].metrics
    assert kedge.train({**config, "resume": True}).stages["grpo"].metrics == before


def test_a_finished_stage_with_other_settings_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is not trained again, and the run does not pretend that the new settings made it."""
    stage = {**SFT, "steps": 1, "evaluation": None}
    kedge.train(recipe(tmp_path, stage))
    again = recipe(tmp_path, {**stage, "optimizer": {"learning_rate": 0.5}}, resume=True)
    kedge.train(again)
    told = "stage 'sft' is finished and stays as it is, made with other settings: optimizer.learning_rate"
    assert told in " ".join(capsys.readouterr().err.split())
    kedge.train(recipe(tmp_path, stage, resume=True))
    assert "other settings" not in capsys.readouterr().err


def test_a_run_that_goes_on_says_where_it_is_not_what_its_recipe_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = ({**SFT, "name": name, "steps": 1, "evaluation": None} for name in ("first", "second"))
    kedge.train(recipe(tmp_path, first, second))
    kedge.train(recipe(tmp_path, {**first, "steps": 2}, second, resume=True))
    told = " ".join(capsys.readouterr().err.split())
    assert "note: stage 'first' goes on with other settings: steps: 1 → 2" in told
    assert (
        "note: stage 'second' is finished and stays as it is, made from what stage 'first' was before" in told
    )


@pytest.mark.parametrize("change", [{"hidden_size": 64}, {"layers": 1}, {"layers": 3}], ids=str)
def test_another_model_is_refused(change: dict[str, int], tmp_path: Path) -> None:
    first, second = ({**SFT, "name": name, "steps": 1, "evaluation": None} for name in ("first", "second"))
    config = recipe(tmp_path, first)
    kedge.train(config)
    model = {**MODEL, "build": {**MODEL["build"], **change}}
    with pytest.raises((UserError, RunError), match="not the model that the run began with"):
        kedge.train({**config, "model": model, "stages": [first, second], "resume": True})


def test_an_existing_run_is_not_overwritten(tmp_path: Path) -> None:
    config = recipe(tmp_path, {**SFT, "steps": 1, "evaluation": None})
    kedge.train(config)
    with pytest.raises(UserError, match="go on with it by resume=true"):
        kedge.train(config)


def test_a_changed_reference_is_refused(tmp_path: Path) -> None:
    tokenizer = sums.tokenizer()
    other = tmp_path / "reference"
    for seed in (1, 2):
        model = build_model(
            len(tokenizer), hidden_size=32, layers=2, heads=2, context=48, seed=seed, pad_id=0, eos_id=1
        )
        save_model(model, tokenizer, other)
        config = recipe(tmp_path, {**GRPO, "steps": 2 * seed, "reference": {"path": str(other)}})
        if seed == 1:
            kedge.train(config)
    with pytest.raises(UserError, match="the reference is not the one this run began with"):
        kedge.train({**config, "resume": True})
