from __future__ import annotations

import re

import pytest

from kedge.errors import UserError
from kedge.tasks import sums

ROWS = sums.examples("train", 3000, seed=0)


def _terms(row: dict[str, str]) -> tuple[int, int]:
    first, second = row["prompt"].removesuffix("=").split("+")
    return int(first), int(second)


def test_the_splits_are_disjoint_whichever_term_comes_first() -> None:
    seen = {
        split: {tuple(sorted(_terms(row))) for row in sums.prompts(split, 6000, 0)}
        for split in ("train", "heldout")
    }
    assert not seen["train"] & seen["heldout"]
    share = len(seen["heldout"]) / len(seen["train"] | seen["heldout"])
    assert share == pytest.approx(sums.HELDOUT_SHARE, abs=0.04)


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_rows_are_of_their_split_and_repeat_with_the_seed(split: str) -> None:
    rows = sums.prompts(split, 200, seed=3)
    assert all(sums.split_of(*_terms(row)) == split for row in rows)
    assert all(int(row["answer"]) == sum(_terms(row)) for row in rows)
    assert rows == sums.prompts(split, 200, seed=3)
    assert rows != sums.prompts(split, 200, seed=4)


def test_every_worked_step_is_right() -> None:
    for first in range(10, 100, 7):
        for second in range(10, 100, 3):
            steps, _, answer = sums.careful(first, second).partition(" #")
            assert int(answer) == first + second
            for step in steps.split():
                assert re.fullmatch(r"\d\+\d(\+1)?=\d+", step)
                left, right = step.split("=")
                assert sum(map(int, left.split("+"))) == int(right)


def test_most_of_the_data_is_wrong_and_all_that_is_careful_is_right() -> None:
    careful = [row for row in ROWS if " " in row["completion"]]
    assert len(careful) / len(ROWS) == pytest.approx(sums.CAREFUL_SHARE, abs=0.04)

    def share(rows: list[dict[str, str]]) -> float:
        columns = [[row[name] for row in rows] for name in ("prompt", "completion", "answer")]
        return sum(sums.correct(columns[0], columns[1], answer=columns[2])) / len(rows)

    assert share(careful) == 1.0
    assert share(ROWS) < 0.45


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        ("#85", 1.0),
        ("7+8=15 #85", 1.0),
        ("#8#85", 1.0),
        ("85", 0.0),
        ("#85 ", 0.0),
        ("#085", 0.0),
        ("#", 0.0),
        ("", 0.0),
    ],
)
def test_only_what_follows_the_last_mark_counts(completion: str, reward: float) -> None:
    assert sums.correct(["47+38="], [completion], answer=["85"]) == [reward]


def test_text_survives_the_tokenizer() -> None:
    tokenizer = sums.tokenizer()
    for row in ROWS[:300]:
        for text in (row["prompt"], row["completion"]):
            ids = tokenizer.encode(text)
            assert len(ids) == len(text)
            assert tokenizer.decode(ids) == text
            assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == text


def test_other_text_is_refused() -> None:
    with pytest.raises(Exception, match="UNK"):
        sums.tokenizer().encode("12*34=")


def test_the_longest_example_fits_the_context() -> None:
    assert max(len(row["prompt"]) + len(row["completion"]) + 1 for row in ROWS) <= sums.CONTEXT


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(UserError, match="train and heldout"):
        sums.prompts("test", 1, seed=0)
