from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kedge.data import Rows, format_rows, load_rows
from kedge.errors import UserError

FIXTURE = Path(__file__).parent / "gsm8k_like.jsonl"
USER = {"role": "user", "content": "2+2?"}
ANSWER = {"role": "assistant", "content": "4"}


def one(row: dict[str, Any], **formats: Any) -> dict[str, Any]:
    return format_rows(Rows([row], source="some.jsonl", unit="line"), **formats)[0]


def test_gsm8k_columns_become_prompt_and_completion() -> None:
    rows = load_rows(FIXTURE)
    filled = format_rows(rows, prompt="Question: {question}\nAnswer:", completion=" {answer}")
    assert filled[0]["prompt"] == f"Question: {rows[0]['question']}\nAnswer:"
    assert filled[0]["completion"] == f" {rows[0]['answer']}"
    assert filled[0]["answer"] == rows[0]["answer"]
    assert filled.place(2) == f"{FIXTURE}, line 3"
    assert "prompt" not in rows[0]


def test_a_column_alone_is_taken_as_it_is() -> None:
    assert one({"prompt": "2+2?"})["prompt"] == "2+2?"
    assert one({"chat": [USER]}, prompt="{chat}")["prompt"] == [USER]
    assert one({"n": 4, "x": 0.5}, prompt="{n}", completion="{x}") == {
        "n": 4,
        "x": 0.5,
        "prompt": "4",
        "completion": "0.5",
    }


def test_braces_doubled_are_literal() -> None:
    assert one({"a": "x{y}"}, prompt="{{{a}}}")["prompt"] == "{x{y}}"
    assert one({"a": "x"}, prompt="no columns")["prompt"] == "no columns"


def test_messages_are_split_before_the_answer() -> None:
    assert one({"messages": [USER, ANSWER], "n": 1}) == {"prompt": [USER], "completion": [ANSWER], "n": 1}
    assert one({"messages": [USER, ANSWER, USER]}) == {"prompt": [USER, ANSWER, USER]}
    with pytest.raises(UserError, match="an answer and no prompt"):
        one({"messages": [ANSWER]})


@pytest.mark.parametrize(
    ("row", "formats", "message"),
    [
        (
            {"question": "q"},
            {"prompt": "{qestion}"},
            r"some.jsonl, line 1: no column 'qestion'.*did you mean 'question'",
        ),
        ({}, {}, r"line 1: no column 'prompt'.*columns: none"),
        ({"a": "b"}, {"prompt": "{a"}, "prompt format '{a': .*doubled"),
        ({"a": "b"}, {"prompt": "{}"}, "not a column's name"),
        ({"a": "b"}, {"prompt": "{0}"}, "not a column's name"),
        ({"a": "b"}, {"prompt": "{a.x}"}, "not a column's name"),
        ({"a": "b"}, {"prompt": "{a!r}"}, "not a column's name"),
        ({"a": 1.0}, {"prompt": "{a:.2f}"}, "not a column's name"),
        ({"a": [USER]}, {"prompt": "Q: {a}"}, "line 1: column 'a' holds chat messages.*'{a}' alone"),
        ({"a": None}, {"prompt": "{a}"}, "line 1, column 'a': None is neither text nor"),
        ({"a": True}, {"prompt": "{a}"}, "line 1, column 'a': True is neither"),
        ({"a": []}, {"prompt": "{a}"}, "is neither text nor a list of chat messages"),
        ({"a": ["x"]}, {"prompt": "{a}"}, "'x' is not a chat message"),
        ({"a": [{"role": "user"}]}, {"prompt": "{a}"}, "is not a chat message"),
        ({"prompt": "p"}, {"completion": "{answer}"}, "no column 'answer', which the completion format"),
    ],
)
def test_what_does_not_fit_is_named(row: dict[str, Any], formats: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        one(row, **formats)
