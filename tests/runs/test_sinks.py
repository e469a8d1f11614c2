from __future__ import annotations

import math
from pathlib import Path

import pytest

from kedge.errors import UserError
from kedge.runs import RunDirectory, read_metrics, sinks


def scalars(folder: Path, name: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_tensorboard_shows_what_was_recorded(tmp_path: Path) -> None:
    config = {"seed": 0, "method": "grpo"}
    with RunDirectory.create(tmp_path / "run", config, resume=False, sinks=["tensorboard"]) as run:
        for step in range(4):
            run.metrics({"step": step, "reward/mean": step / 2, "loss": math.nan if step == 1 else 1.0})
    assert scalars(run.path, "reward/mean") == [(0, 0.0), (1, 0.5), (2, 1.0), (3, 1.5)]
    assert [step for step, _ in scalars(run.path, "loss")] == [0, 2, 3]


def test_tensorboard_forgets_steps_that_are_made_again(tmp_path: Path) -> None:
    with RunDirectory.create(tmp_path / "run", {}, resume=False, sinks=["tensorboard"]) as run:
        for step in range(4):
            run.metrics({"step": step, "loss": 1.0})
    with RunDirectory.create(tmp_path / "run", {}, resume=True, sinks=["tensorboard"]) as run:
        run.truncate_after(1)
        run.metrics({"step": 2, "loss": 2.0})
    assert scalars(run.path, "loss") == [(0, 1.0), (1, 1.0), (2, 2.0)]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_services_take_a_run_and_its_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when trackio is imported
    pytest.importorskip(name)
    for resume in (False, True):
        with RunDirectory.create(tmp_path / "run", {"seed": 0}, resume=resume, sinks=[name]) as run:
            run.truncate_after(1)
            for step in range(2 if resume else 0, 4):
                run.metrics({"step": step, "loss": math.nan if step == 1 else 1.0})
    assert "failed" not in (run.path / "log.txt").read_text()
    identity = (run.path / ".sink-identity").read_text()
    files = [
        file
        for folder in ("run/wandb", "trackio")
        for file in (tmp_path / folder).rglob("*")
        if file.is_file()
    ]
    assert any(identity.encode() in file.read_bytes() for file in files)


def test_a_missing_package_names_the_extra_and_leaves_nothing(tmp_path: Path) -> None:
    missing = [name for name in sinks.SINKS if sinks.importlib.util.find_spec(name) is None]
    for name in missing:
        with pytest.raises(UserError, match=rf"pip install 'kedge\[{name}\]'"):
            RunDirectory.create(tmp_path / "run", {}, resume=False, sinks=[name])
    with pytest.raises(UserError, match="unknown sink 'mlflow'"):
        RunDirectory.create(tmp_path / "run", {}, resume=False, sinks=["mlflow"])
    assert not (tmp_path / "run").exists()


def test_a_sink_that_cannot_be_opened_is_the_users_to_put_right(tmp_path: Path) -> None:
    RunDirectory.create(tmp_path / "run", {}, resume=False)
    (tmp_path / "run" / "tensorboard").write_text("a file in the way")
    with pytest.raises(UserError, match=r"'tensorboard' could not be opened.*resume=true"):
        RunDirectory.create(tmp_path / "run", {}, resume=True, sinks=["tensorboard"])


class Failing:
    name = "failing"

    def metrics(self, step: int, row: object) -> None:
        raise ConnectionError("no route")

    def truncate_after(self, step: int) -> None:
        raise ConnectionError("no route")

    def close(self) -> None:
        raise ConnectionError("no route")


def test_a_failing_service_is_dropped_and_the_run_goes_on(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    run = RunDirectory(tmp_path / "run", resumed=False, sinks=[Failing()])
    run.metrics({"step": 1})
    run.metrics({"step": 2})
    run.close()
    assert [row["step"] for row in read_metrics(run.path)] == [1, 2]
    assert (run.path / "log.txt").read_text().count("'failing' failed") == 1
