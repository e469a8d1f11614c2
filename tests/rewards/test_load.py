from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest

from kedge.errors import UserError
from kedge.rewards import RewardSet, load_reward
from kedge.tasks import sums

SOURCE = """
from helper import LIMIT

def brevity(prompts, completions, **_):
    return [float(len(text) < LIMIT) for text in completions]

not_callable = 3
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "my_rewards.py").write_text(SOURCE)
    (tmp_path / "helper.py").write_text("LIMIT = 3\n")
    return tmp_path


@pytest.fixture(autouse=True)
def _clean_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "modules", dict(sys.modules))


def test_by_module() -> None:
    assert load_reward("kedge.tasks.sums:correct") is sums.correct


def test_by_file_with_its_neighbours(folder: Path) -> None:
    before = list(sys.path)
    for spec in (f"{folder}/my_rewards.py:brevity", "my_rewards.py:brevity"):
        function = load_reward(spec, folder=folder)
        assert RewardSet([("brevity", function, 1.0)]).score(["p", "p"], ["ab", "abc"]).total == [1.0, 0.0]
    assert sys.path == before


def test_files_of_one_name_stay_apart(tmp_path: Path) -> None:
    for number in (1, 2):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "r.py").write_text(f"def f(prompts, completions): return [{number}]\n")
    functions = [load_reward(f"{tmp_path}/{number}/r.py:f") for number in (1, 2)]
    assert [function([], []) for function in functions] == [[1], [2]]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("my_rewards.py", "write it as module:function or path.py:function"),
        (":f", "write it as"),
        ("my_rewards.py:", "write it as"),
        ("my_reward.py:brevity", r"no file .*my_reward.py; did you mean my_rewards.py\?"),
        ("elsewhere/my_rewards.py:brevity", "no file .*elsewhere/my_rewards.py$"),
        ("my_rewards.py:brevty", r"has no function 'brevty'; did you mean brevity\?"),
        ("my_rewards.py:not_callable", "not_callable is a int, not a function"),
        ("kedge.tasks.sums:corect", r"has no function 'corect'; did you mean correct\?"),
        ("kedge.tasks.sms:correct", r"no module 'kedge.tasks.sms'; did you mean sums\?"),
        ("kedge.tusks.sums:correct", r"no module 'kedge.tusks'; did you mean tasks\?"),
        ("jsn:loads", "no module 'jsn'; did you mean .*json"),
        ("no_such_module_at_all:f", "no module 'no_such_module_at_all'$"),
    ],
)
def test_what_is_not_there_is_named_with_what_is(folder: Path, spec: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_reward(spec, folder=folder)
    assert repr(spec) in str(caught.value)


def test_functions_of_one_file_are_of_one_module(folder: Path) -> None:
    loaded: dict[str, ModuleType] = {}
    first, again = (load_reward("my_rewards.py:brevity", folder=folder, loaded=loaded) for _ in range(2))
    assert first is again
    assert load_reward("my_rewards.py:brevity", folder=folder) is not first


def test_a_file_named_as_a_module_is_pointed_at(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [each for each in sys.path if each])
    with pytest.raises(
        UserError, match=r"no module 'my_rewards'; did you mean my_rewards\.py:brevity, the file"
    ):
        load_reward("my_rewards:brevity")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "import no_such_dependency\n",
            r"importing it failed: ModuleNotFoundError: .*no_such_dependency.*line 1\)",
        ),
        (
            "x = 1\ny = 1 / 0\n",
            r"importing it failed: ZeroDivisionError: division by zero \(.*broken.py, line 2\)",
        ),
        ("def f(:\n", r"importing it failed: SyntaxError: .*broken.py, line 1\)"),
    ],
)
def test_what_fails_to_import_is_named(
    tmp_path: Path, source: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken.py").write_text(source)
    with pytest.raises(UserError, match=message):
        load_reward("broken.py:f", folder=tmp_path)
    assert not [name for name in sys.modules if name.startswith("kedge_reward_broken")]
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=message):
        load_reward("broken:f")
