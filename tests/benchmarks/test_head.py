"""The head's benchmark runs at tiny sizes, knows every contender, and fails when a goal does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.head.contender import PLAIN, Absent, Contender, Step
from benchmarks.head.goals import LIMITS, Goal
from benchmarks.head.inputs import Inputs, Size, make_inputs
from benchmarks.head.losses import EXACT, PRODUCTS, TASKS
from benchmarks.head.plain import exact_step
from benchmarks.head.scaling import exponent
from benchmarks.head.timing import enter, race, try_whole

ROOT = Path(__file__).parents[2]
FAMILIES = {
    "bare products",
    "bare products as Kedge makes them",
    "kedge reduce compiled",
    "kedge reduce chunked",
    "kedge score compiled",
    "dense",
    "dense compiled",
    "torch linear_cross_entropy",
    "trl selective_log_softmax",
    "liger fused linear GRPO",
    "liger fused linear cross-entropy",
    "cut-cross-entropy",
}


def run(output: Path, *options: str) -> tuple[int, dict[str, Any]]:
    command = [sys.executable, "-m", "benchmarks.head", "--quick", "--no-compile", "--threads", "1"]
    paths = os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [*command, "--device", "cpu", "--output", str(output), *options],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert output.exists(), done.stderr
    return done.returncode, json.loads(output.read_text(encoding="utf-8"))


def test_a_quick_run_has_every_contender_and_its_status_is_the_goals(tmp_path: Path) -> None:
    status, found = run(tmp_path / "one.json", "--goal", "time/products=0.001", "memory/dense=1000")
    (size,) = found["sizes"]
    assert {each["family"] for each in size["contenders"] + size["absent"]} == FAMILIES
    assert {each["task"] for each in size["contenders"]} == set(TASKS)
    for each in size["contenders"]:
        assert each["seconds"]["median"] > 0
        assert each["side"] == "floor" or each["gradient_error"] < 1e-5, each["name"]
        assert each["retired"] or len(each["seconds"]["rounds"]) >= 5
    assert all(each["reason"] for each in size["absent"])
    measured = [each["family"] for each in size["contenders"] if each["memory"]]
    assert sorted(measured) == ["dense", "kedge reduce chunked"]
    assert {point["along"] for point in found["scaling"]} == {"N", "V"}
    assert len(found["scaling"]) == 8
    verdicts = {goal["name"]: goal["verdict"] for goal in found["goals"] if goal["limit"] is not None}
    assert verdicts == {"time/products": "fall short", "memory/dense": "pass"}
    assert status == 1

    status, found = run(tmp_path / "two.json", "--no-scaling", "--no-memory", "--goal", "time/products=1e9")
    assert [goal["verdict"] for goal in found["goals"] if goal["name"] == "time/products"] == ["pass"]
    assert status == 0


@pytest.fixture(scope="module")
def inputs() -> Inputs:
    return make_inputs(Size.read("64,16,200"), torch.device("cpu"), torch.float32)


def contender(setting: str, factor: float) -> Contender:
    """Exact KL in plain PyTorch, with gradients that are off by a factor."""

    def build(inputs: Inputs) -> Step:
        right = exact_step(inputs, compiles=False)

        def step() -> torch.Tensor:
            loss = right()
            inputs.weight.grad.mul_(factor)
            return loss

        return step

    return Contender(EXACT, "dense", setting, build, PLAIN)


def test_wrong_gradients_do_not_take_part(inputs: Inputs) -> None:
    entrants, absent = enter([contender("right", 1.0), contender("wrong", 1.5)], inputs, str)
    assert [each.contender.setting for each in entrants] == ["right"]
    assert isinstance(absent[0], Absent)
    assert "off by 50%" in absent[0].reason


def test_a_failing_contender_is_absent_with_its_reason(inputs: Inputs) -> None:
    def build(_: Inputs) -> Step:
        raise RuntimeError("no such kernel")

    entrants, (absent,) = enter([Contender(EXACT, "peer", "", build, PLAIN)], inputs, str)
    assert (entrants, absent.reason) == ([], "fails: RuntimeError: no such kernel")


def test_contenders_take_turns(inputs: Inputs) -> None:
    turns: list[str] = []

    def noting(name: str) -> Contender:
        return Contender(EXACT, name, "", lambda _: lambda: turns.append(name), PLAIN)  # type: ignore[arg-type]

    entrants, _ = enter([contender("right", 1.0)], inputs, str)
    for name in "AB":
        made = noting(name)
        entrants.append(type(entrants[0])(made, made.build(inputs), None))
    racing = entrants[1:]
    assert try_whole(racing, inputs, str) == []
    race(racing, inputs, 0.0, str)
    assert turns == ["A", "A", "B", "B"] * 6  # a trial, then five rounds; the second of two runs counts
    assert all(len(each.seconds) == 5 for each in racing)


def test_who_fails_at_the_full_size_is_absent(inputs: Inputs) -> None:
    def out_of_memory() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 60 GiB")

    entrants, _ = enter([contender("right", 1.0)], inputs, str)
    large = Contender(EXACT, "large", "8 rows", lambda _: out_of_memory, PLAIN)  # type: ignore[arg-type]
    entrants.append(type(entrants[0])(large, large.build(inputs), None))
    absent = try_whole(entrants, inputs, str)
    assert absent == [Absent(EXACT, "large", "8 rows: fails: OutOfMemoryError: CUDA out of memory.")]
    assert [each.contender.setting for each in entrants] == ["right"]


def test_goals() -> None:
    def verdict(figure: float | None, limit: float | None) -> str:
        return Goal("time/products", "", "", figure, limit).verdict

    assert verdict(1.1, LIMITS["time/products"]) == "pass"
    assert verdict(1.2, LIMITS["time/products"]) == "fall short"
    assert verdict(1.2, None) == "for information"
    assert verdict(None, 1.12) == "not checked"
    assert verdict(float("nan"), 1.12) == "fall short"


def test_the_exponent_of_a_power_is_found() -> None:
    assert exponent([(x, 3 * x**1.7) for x in (1.0, 2.0, 5.0)]) == pytest.approx(1.7)


def test_every_task_has_its_products() -> None:
    assert set(PRODUCTS) == set(TASKS)
