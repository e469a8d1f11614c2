"""Whatever ends a run inside a step: what is saved goes on to the same numbers."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import kedge
from kedge.errors import RunError
from kedge.models import build_model
from kedge.runs import read_metrics
from kedge.tasks import sums
from kedge.training.progress import PlainProgress
from tests.training.small import GRPO, PPO, SFT, recipe, without_clock

FEW = {"steps": 2, "epochs": 2, "minibatches": 2, "old_kl_limit": 10.0, "checkpoint": {"every": 50}}
BASES = {
    "grpo": {**GRPO, **FEW},
    "ppo": {**PPO, **FEW, "trust_region": {"penalty": {"beta": 0.01, "target": 1e-3}}},
}


class Passes:
    """Counts the passes of a model and of its copies; one of them has no memory."""

    def __init__(self, fails: int | None = None) -> None:
        self.count, self.fails = 0, fails

    def __call__(self, *_: Any) -> None:
        self.count += 1
        if self.count == self.fails:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    def __deepcopy__(self, memo: Any) -> Passes:
        return self


def policy(passes: Passes) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    tokenizer = sums.tokenizer()
    model = build_model(
        len(tokenizer), hidden_size=32, layers=2, heads=2, context=48, seed=1, pad_id=0, eos_id=1
    )
    model.base_model.register_forward_pre_hook(passes)
    return model, tokenizer


def train(folder: Path, name: str, fails: int | None = None, **changes: Any) -> Passes:
    passes = Passes(fails)
    model, tokenizer = policy(passes)
    kedge.train(recipe(folder, BASES[name], **changes), model=model, tokenizer=tokenizer)
    return passes


@pytest.fixture(scope="module", params=BASES)
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, int, Any]:
    """A run that nothing ends: which, how many passes it takes, its metrics."""
    folder = tmp_path_factory.mktemp("whole")
    passes = train(folder, request.param)
    return request.param, passes.count, without_clock(read_metrics(folder / "run" / request.param))


@pytest.mark.parametrize("place", [0.2, 0.5, 0.65, 0.9])
def test_out_of_memory_in_any_pass_loses_nothing(
    place: float, whole: tuple[str, int, Any], tmp_path: Path
) -> None:
    """In a rollout, in scoring, in an update, in an evaluation."""
    name, count, metrics = whole
    with pytest.raises(RunError, match=r"out of memory in step \d: .*Lower compute\.micro_batch"):
        train(tmp_path, name, fails=int(place * count))
    saved = list((tmp_path / "run" / name / "checkpoints").glob("step-*"))
    assert saved or place < 0.5  # nothing, where the first evaluation has failed
    train(tmp_path, name, resume=True)
    found = without_clock(read_metrics(tmp_path / "run" / name))
    assert repr(found) == repr(metrics)


def test_half_an_update_is_not_saved(
    whole: tuple[str, int, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An optimizer that breaks down once it has moved parameters: the run goes on from before, or from the start."""
    name, _, metrics = whole
    real, taken = torch.optim.AdamW.step, []

    def breaking(optimizer: torch.optim.AdamW, *arguments: Any) -> Any:
        taken.append(real(optimizer, *arguments))
        if len(taken) == 6:
            raise ValueError("no more")

    with monkeypatch.context() as patched:
        patched.setattr(torch.optim.AdamW, "step", breaking)
        with pytest.raises(ValueError, match="no more"):
            train(tmp_path, name)
    train(tmp_path, name, resume=True)
    assert repr(without_clock(read_metrics(tmp_path / "run" / name))) == repr(metrics)


def test_no_pass_takes_more_sequences_than_micro_batch(tmp_path: Path) -> None:
    """The checks of the first step among them: what training has memory for, they have."""
    taken: list[int] = []

    def take(_: Any, arguments: tuple[Any, ...], given: dict[str, Any]) -> None:
        taken.append(len(given["input_ids"] if "input_ids" in given else arguments[0]))

    model, tokenizer = policy(Passes())
    model.base_model.register_forward_pre_hook(take, with_kwargs=True)
    rollout = {**GRPO["rollout"], "prompts_at_once": 1}
    changes = {"rollout": rollout, "compute": {"micro_batch": 4}, "evaluation": None, "steps": 1}
    kedge.train(recipe(tmp_path, {**GRPO, **changes}), model=model, tokenizer=tokenizer)
    assert max(taken) == 4


class Listener(PlainProgress):
    """Falls over when it hears of one step."""

    def __init__(self, falls: int | None) -> None:
        super().__init__()
        self.falls = falls

    def step(self, step: int, steps: int, metrics: Mapping[str, float]) -> None:
        super().step(step, steps, metrics)
        if step == self.falls:
            raise ValueError("no ears")


def test_the_best_model_is_kept_where_its_step_failed_behind_the_evaluation(tmp_path: Path) -> None:
    stage = {**SFT, "steps": 8, "optimizer": {"learning_rate": 0.3}, "checkpoint": {"every": 50, "keep": 1}}

    def best(name: str, falls: int | None, **changes: Any) -> str:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        kedge.train(recipe(folder, stage, **changes), progress=Listener(falls))
        return str((folder / "run" / "sft" / "checkpoints" / "best").readlink())

    whole = best("whole", None)
    step = int(whole.rpartition("-")[2])
    assert step < 8
    with pytest.raises(ValueError, match="no ears"):
        best("fallen", step)
    assert best("fallen", None, resume=True) == whole


def test_a_run_goes_on_when_nobody_listens_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    end, pipe = os.pipe()
    os.close(end)
    with io.TextIOWrapper(io.FileIO(pipe, "w"), write_through=True) as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        PlainProgress().say("into the void")
        monkeypatch.undo()
        with pytest.raises(BrokenPipeError):
            stream.write("and it is one")
