from __future__ import annotations

import math
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from kedge.errors import UserError
from kedge.rewards import RewardError, RewardSet, RewardTimeoutError, WeightedReward

PROMPTS = ["p0", "p1", "p2", "p3"]
COMPLETIONS = ["", "a", "bb", "ccc"]

Reward = Callable[..., Any]


def length(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    return [float(len(text)) for text in completions]


def returning(value: Any) -> Reward:
    return lambda prompts, completions, **_: value


def only(function: Reward, **options: Any) -> RewardSet:
    return RewardSet([("mine", function, 1.0)], **options)


def equal(found: list[float], expected: list[float]) -> bool:
    return all((math.isnan(a) and math.isnan(b)) or a == b for a, b in zip(found, expected, strict=True))


def test_rewards_are_weighted_and_summed() -> None:
    rewards = RewardSet([("length", length, 2.0), ("one", returning([1, True, 1.0, 0]), -0.5)])
    result = rewards.score(PROMPTS, COMPLETIONS)
    assert result.total == [-0.5, 1.5, 3.5, 6.0]
    assert result.by_name == {"length": [0.0, 1.0, 2.0, 3.0], "one": [1.0, 1.0, 1.0, 0.0]}
    assert result.dropped == []


def test_a_weight_of_zero_measures_without_rewarding() -> None:
    rewards = RewardSet([("length", length, 1.0), ("watched", returning([9.0, None, 9.0, 9.0]), 0.0)])
    result = rewards.score(PROMPTS, COMPLETIONS)
    assert result.total == [0.0, 1.0, 2.0, 3.0]
    assert equal(result.by_name["watched"], [9.0, math.nan, 9.0, 9.0])


def test_none_leaves_a_response_to_the_other_functions() -> None:
    rewards = RewardSet(
        [("a", returning([1.0, None, None, 2.0]), 1.0), ("b", returning([None, 3.0, None, 4.0]), 2.0)]
    )
    assert equal(rewards.score(PROMPTS, COMPLETIONS).total, [1.0, 6.0, math.nan, 10.0])


def test_a_response_that_only_an_unweighted_function_scores_is_unscorable() -> None:
    rewards = RewardSet([("a", returning([None] * 4), 1.0), ("b", length, 0.0)])
    assert equal(rewards.score(PROMPTS, COMPLETIONS).total, [math.nan] * 4)


def test_functions_are_called_as_trl_calls_them() -> None:
    seen: dict[str, Any] = {}

    def spy(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
        seen.update(prompts=prompts, completions=completions, columns=columns)
        return [0.0] * len(prompts)

    chat = [[{"role": "user", "content": "2+2?"}]]
    said = [[{"role": "assistant", "content": "4"}]]
    only(spy).score(chat, said, {"answer": ["4"], "level": [1]})
    assert seen == {"prompts": chat, "completions": said, "columns": {"answer": ["4"], "level": [1]}}


def test_functions_without_keywords_get_the_columns_they_name() -> None:
    def exact(completions: list[str], prompts: list[str], answer: list[str]) -> list[float]:
        return [float(a == b) for a, b in zip(completions, answer, strict=True)]

    columns: dict[str, list[Any]] = {"answer": ["", "a", "x", "ccc"], "level": [1, 2, 3, 4]}
    assert only(exact).score(PROMPTS, COMPLETIONS, columns).total == [1.0, 1.0, 0.0, 1.0]


def test_missing_columns_and_arguments_are_found_before_a_call() -> None:
    def exact(prompts: list[str], completions: list[str], answer: list[str], **_: Any) -> list[float]:
        raise AssertionError("called")

    with pytest.raises(UserError, match=r"'mine' needs the column 'answer'.*their columns: level"):
        only(exact).check_columns(["prompts", "level"])
    with pytest.raises(UserError, match="'mine' needs the column 'answer'"):
        only(exact, on_error="drop").score(PROMPTS, COMPLETIONS, {"level": [0] * 4})
    only(exact).check_columns(["answer"])
    with pytest.raises(UserError, match="takes no argument 'completions'"):
        only(lambda prompts: [0.0]).check_columns([])


class Scalar:
    """A number as numpy and torch have them."""

    def __init__(self, value: float) -> None:
        self.value = value

    def item(self) -> float:
        return self.value


class Array:
    """A list of numbers as numpy and torch have them."""

    def __init__(self, values: list[float]) -> None:
        self.values = values

    def tolist(self) -> list[float]:
        return self.values


@pytest.mark.parametrize(
    "value",
    [[1.0, 2.0, 3.0, 4.0], (1, 2, 3, 4), Array([1.0, 2.0, 3.0, 4.0]), [Scalar(1.0), 2, Scalar(3), 4.0]],
)
def test_lists_tuples_and_arrays_are_taken(value: Any) -> None:
    assert only(returning(value)).score(PROMPTS, COMPLETIONS).total == [1.0, 2.0, 3.0, 4.0]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1.0, 2.0, 3.0], "'mine' returned 3 values for 4 completions"),
        ([1.0] * 5, "returned 5 values for 4 completions"),
        ([], "returned 0 values for 4 completions"),
        (None, "returned None instead of a list of 4 numbers"),
        (1.0, "returned a float instead of a list"),
        ("1234", "returned the string '1234' instead of a list"),
        ({"a": 1}, "returned a dict instead of a list"),
        (Array(1.0), "returned a Array instead of a list"),  # type: ignore[arg-type]
        ([0.0, 0.0, math.nan, 0.0], r"returned nan for sample 2 \(prompt 'p2', completion 'bb'\)"),
        ([0.0, math.inf, 0.0, 0.0], r"returned inf for sample 1 \(prompt 'p1', completion 'a'\)"),
        ([0.0, 0.0, 0.0, -math.inf], "returned -inf for sample 3"),
        ([0.0, 1e39, 0.0, 0.0], r"returned 1e\+39 for sample 1 .*within float32's range"),
        ([0.0, "1.0", 0.0, 0.0], "returned the string '1.0' for sample 1"),
        ([[0.0], 0.0, 0.0, 0.0], "returned a list for sample 0"),
        ([0.0, 0.0, 0.0, 1j], "returned a complex for sample 3"),
    ],
)
@pytest.mark.parametrize("time_limit", [None, 20.0])
def test_what_is_no_list_of_numbers_stops(value: Any, message: str, time_limit: float | None) -> None:
    with pytest.raises(RewardError, match=message) as caught:
        only(returning(value), time_limit=time_limit).score(PROMPTS, COMPLETIONS)
    assert caught.value.reward == "mine"
    found = re.search(r"sample (\d)", message)
    assert caught.value.sample == (int(found[1]) if found else None)


def raising(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    if any("b" in text for text in completions):
        raise KeyError("no such key")
    return [1.0] * len(completions)


@pytest.mark.parametrize("time_limit", [None, 20.0])
def test_what_raises_stops_with_its_traceback_for_the_log(time_limit: float | None) -> None:
    with pytest.raises(RewardError, match="'mine' raised KeyError: 'no such key'") as caught:
        only(raising, time_limit=time_limit).score(PROMPTS, COMPLETIONS)
    assert 'raise KeyError("no such key")' in caught.value.traceback
    assert "Traceback (most recent call last)" in caught.value.traceback
    assert "\n" not in str(caught.value)


def alarming(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    """As math-verify limits its time."""
    before = signal.signal(signal.SIGALRM, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, before)
    return [1.0] * len(completions)


@pytest.mark.skipif(not hasattr(signal, "SIGALRM"), reason="there are no alarms here")
def test_a_function_that_needs_the_main_thread_says_what_to_set() -> None:
    with pytest.raises(RewardError, match=r"'mine' raised ValueError: .*set rewards\.time_limit: null"):
        only(alarming, time_limit=20.0).score(PROMPTS, COMPLETIONS)
    assert only(alarming).score(PROMPTS, COMPLETIONS).total == [1.0] * len(COMPLETIONS)


@pytest.mark.parametrize("time_limit", [None, 20.0])
def test_a_function_that_leaves_the_process_stops_the_run_as_any_other(time_limit: float | None) -> None:
    def leaving(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        sys.exit(3)

    with pytest.raises(RewardError, match="'mine' raised SystemExit: 3"):
        only(leaving, time_limit=time_limit).score(PROMPTS, COMPLETIONS)


def looping(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    while "bb" in completions:
        try:
            time.sleep(0.001)
        except Exception:  # noqa: BLE001  (the interruption must get past it)
            return []
    return [1.0] * len(completions)


def test_what_hangs_is_interrupted_and_stops() -> None:
    started = time.monotonic()
    with pytest.raises(
        RewardTimeoutError, match=r"'mine' did not return within its time limit of 0.2 s; make"
    ):
        only(looping, time_limit=0.2).score(PROMPTS, COMPLETIONS)
    assert time.monotonic() - started < 10
    assert not [thread for thread in threading.enumerate() if thread.name == "kedge-reward"]


def test_what_cannot_be_interrupted_is_left_behind_and_does_not_keep_the_process() -> None:
    program = textwrap.dedent(
        """
        import time
        from kedge.rewards import RewardSet, RewardError
        rewards = RewardSet([("deaf", lambda prompts, completions: time.sleep(3600), 1.0)], time_limit=0.1)
        try:
            rewards.score(["p"], ["c"])
        except RewardError as error:
            print(error)
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True
    )
    assert "left behind in its thread" in done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("function", "message"),
    [(raising, "raised KeyError"), (looping, "time limit"), (returning([0.0]), "1 values for 4")],
)
def test_dropping_finds_the_culprits(function: Reward, message: str) -> None:
    rewards = RewardSet([("mine", function, 1.0), ("length", length, 1.0)], time_limit=0.3, on_error="drop")
    result = rewards.score(PROMPTS, COMPLETIONS)
    if function in (raising, looping):
        assert equal(result.by_name["mine"], [1.0, 1.0, math.nan, 1.0])
        assert equal(result.total, [1.0, 2.0, math.nan, 4.0])
        (error,) = result.dropped
        assert (error.reward, error.sample) == ("mine", 2)
        assert message in str(error)
    else:  # wrong for the batch, right one by one
        assert result.total == [0.0, 1.0, 2.0, 3.0]
        assert result.dropped == []


def test_dropping_sees_the_columns_of_its_sample() -> None:
    def fussy(prompts: list[str], completions: list[str], answer: list[str]) -> list[float]:
        if "bad" in answer:
            raise ValueError(answer)
        return [float(len(a)) for a in answer]

    result = only(fussy, on_error="drop").score(PROMPTS, COMPLETIONS, {"answer": ["x", "bad", "xx", "xxx"]})
    assert equal(result.total, [1.0, math.nan, 2.0, 3.0])


def test_too_many_batches_with_a_culprit_in_a_row_stop() -> None:
    rewards = only(raising, on_error="drop", max_consecutive_drops=3)
    for _ in range(2):
        assert rewards.score(PROMPTS, COMPLETIONS).dropped
    assert not rewards.score(["p"], ["fine"]).dropped
    for _ in range(2):
        rewards.score(PROMPTS, COMPLETIONS)
    resumed = only(raising, on_error="drop", max_consecutive_drops=3)
    resumed.load_state_dict(rewards.state_dict())
    with pytest.raises(RewardError, match=r"'mine' failed in 3 batches in a row.*no such key") as caught:
        resumed.score(PROMPTS, COMPLETIONS)
    assert "Traceback" in caught.value.traceback


def test_one_that_always_hangs_stops_within_the_batch() -> None:
    def stuck(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        while True:
            time.sleep(0.001)

    started = time.monotonic()
    with pytest.raises(RewardTimeoutError):
        only(stuck, time_limit=0.05, on_error="drop", max_consecutive_drops=2).score(["p"] * 100, ["c"] * 100)
    assert time.monotonic() - started < 4


def test_an_empty_batch_is_scored() -> None:
    assert only(length).score([], []).total == []


async def later(prompts: list[str], completions: list[str]) -> list[float]:
    return [0.0]


@pytest.mark.parametrize(
    ("rewards", "options", "message"),
    [
        ([], {}, "no reward function"),
        ([("a", length, 1.0), ("a", length, 2.0)], {}, "two rewards are called 'a'"),
        ([("a", length, 0.0)], {}, "every reward has weight 0"),
        ([("a", length, math.nan)], {}, "its weight is nan"),
        *(
            (
                [(name, length, 1.0), ("b", length, 1.0)],
                {},
                f"reward '{name}': metrics of all rewards together",
            )
            for name in ("total", "mean", "std", "unscorable_fraction", "b_se")
        ),
        ([("a", later, 1.0)], {}, "is async"),
        ([("a", length, 1.0)], {"time_limit": 0.0}, "time_limit must be positive"),
        ([("a", length, 1.0)], {"max_consecutive_drops": 0}, "at least 1"),
    ],
)
def test_sets_that_mean_nothing_are_refused(rewards: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        RewardSet(rewards, **options)


def test_the_room_needs_no_torch() -> None:
    program = "import sys, kedge.rewards, kedge.data; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


IDS = {"prompt_ids": [[1], [2], [3], [4]], "completion_ids": [[5], [6, 7], [8], [9]]}


def test_token_ids_go_to_functions_that_name_them() -> None:
    seen: list[Any] = []

    def by_tokens(
        prompts: list[str], completions: list[str], completion_ids: list[list[int]], **columns: Any
    ) -> Any:
        seen.append((completion_ids, columns))
        return [float(len(ids)) for ids in completion_ids]

    def by_text(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        seen.append(columns)
        return [0.0] * len(prompts)

    rewards = RewardSet([("tokens", by_tokens, 1.0), ("text", by_text, 1.0)])
    rewards.check_columns(["answer"])
    assert rewards.score(PROMPTS, COMPLETIONS, {"answer": list("abcd"), **IDS}).total == [1.0, 2.0, 1.0, 1.0]
    assert seen == [(IDS["completion_ids"], {"answer": list("abcd")}), {"answer": list("abcd")}]

    def finished(prompts: list[str], completions: list[str], completion_finished: list[bool]) -> Any:
        return [float(each) for each in completion_finished]

    only(finished).check_columns(["answer"])
    ended = {"completion_finished": [True, False, True, True]}
    assert only(finished).score(PROMPTS, COMPLETIONS, ended).total == [1.0, 0.0, 1.0, 1.0]
    with pytest.raises(UserError, match="needs the column 'completion_ids'"):
        rewards.score(PROMPTS, COMPLETIONS)


def test_the_time_limit_is_for_functions_that_are_timed() -> None:
    def slow(prompts: list[str], completions: list[str]) -> list[float]:
        time.sleep(0.3)
        return [1.0] * len(prompts)

    assert (
        RewardSet([WeightedReward("mine", slow, 1.0, timed=False)], time_limit=0.1)
        .score(PROMPTS, COMPLETIONS)
        .total
        == [1.0] * 4
    )
    with pytest.raises(RewardTimeoutError):
        only(slow, time_limit=0.1).score(PROMPTS, COMPLETIONS)
