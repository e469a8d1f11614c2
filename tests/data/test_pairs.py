from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.data.test_encode import ANSWER, CHAT, PLAIN, USER, characters

from kedge.data import Pair, Rows, encode_example, encode_pair, format_pairs, load_rows
from kedge.errors import UserError

WRONG = {"role": "assistant", "content": "5"}
SYSTEM = {"role": "system", "content": "Be brief."}
ROW: dict[str, Any] = {"prompt": "2+2=", "chosen": "4", "rejected": "5"}


def written(folder: Path, *rows: Any) -> Rows:
    file = folder / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return load_rows(file)


def encoded(rows: Rows) -> list[Pair]:
    formatted = format_pairs(rows)
    return [encode_pair(row, PLAIN, place=formatted.place(index)) for index, row in enumerate(formatted)]


def test_a_pair_is_two_examples() -> None:
    pair = encode_pair(ROW, PLAIN)
    for side, tokens in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        expected, _ = encode_example({"prompt": ROW["prompt"], "completion": ROW[side]}, PLAIN)
        assert tokens == expected
        assert tokens[-1] == PLAIN.eos_token_id
    assert pair.margin is None


@pytest.mark.parametrize(("given", "expected"), [(0.5, 0.5), (2, 2.0), (0, 0.0), (None, None)])
def test_margin(given: float | None, expected: float | None) -> None:
    assert encode_pair({**ROW, "margin": given}, PLAIN).margin == expected


def test_formats() -> None:
    rows = Rows([{"q": "2+2", "good": "4", "bad": "5", "margin": 1.0}])
    (row,) = format_pairs(rows, prompt="Q: {q}\nA:", chosen=" {good}", rejected=" {bad}")
    assert (row["prompt"], row["chosen"], row["rejected"], row["margin"]) == ("Q: 2+2\nA:", " 4", " 5", 1.0)


CONVERSATIONS: dict[str, dict[str, Any]] = {
    "prompt apart": {"prompt": [SYSTEM, USER], "chosen": [ANSWER], "rejected": [WRONG]},
    "answers as text": {"prompt": [SYSTEM, USER], "chosen": "4", "rejected": "5"},
    "whole": {"chosen": [SYSTEM, USER, ANSWER], "rejected": [SYSTEM, USER, WRONG]},
    "whole, prompt beside them": {
        "prompt": "2+2?",
        "chosen": [SYSTEM, USER, ANSWER],
        "rejected": [SYSTEM, USER, WRONG],
    },
}


@pytest.mark.parametrize("row", CONVERSATIONS.values(), ids=CONVERSATIONS.keys())
def test_conversations(row: dict[str, Any]) -> None:
    """Every form of the same pair gives the same tokens: the template's, up to the end of the answer."""
    chat = characters(chat=CHAT)
    (found,) = format_pairs(Rows([row]))
    pair = encode_pair(found, chat)
    text = "<s>system\nBe brief.</s>\n<s>user\n2+2?</s>\n<s>assistant\n4</s>"
    assert chat.decode(pair.chosen) == text
    assert chat.decode(pair.rejected) == text.replace("\n4<", "\n5<")


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "equal": ({**ROW, "rejected": "4"}, "line 2: 'chosen' and 'rejected' are the same text"),
    "equal messages": ({"prompt": [USER], "chosen": [ANSWER], "rejected": [ANSWER]}, "are the same text"),
    "empty": ({**ROW, "chosen": ""}, "line 2: 'chosen' is empty"),
    "empty message": (
        {"prompt": [USER], "chosen": [ANSWER], "rejected": [{"role": "assistant", "content": ""}]},
        "line 2: 'rejected' is empty",
    ),
    "no rejected": (
        {"prompt": "2+2=", "chosen": "4"},
        "line 2: no column 'rejected', which the rejected format",
    ),
    "no prompt": ({"chosen": "4", "rejected": "5"}, "line 2: no column 'prompt'"),
    "empty prompt": ({**ROW, "prompt": ""}, "line 2, chosen: the prompt is empty"),
    "null": ({**ROW, "rejected": None}, "column 'rejected': None is neither text"),
    "mixed": ({**ROW, "rejected": [WRONG]}, "line 2, rejected: the prompt is text and the completion chat"),
    "no template": ({"prompt": [USER], "chosen": [ANSWER], "rejected": [WRONG]}, "has no chat template"),
    "text margin": ({**ROW, "margin": "large"}, "line 2: margin is 'large'; it must be a number"),
    "negative margin": ({**ROW, "margin": -1.0}, "line 2: margin is -1.0"),
    "NaN margin": ({**ROW, "margin": float("nan")}, "line 2: margin is nan"),
    "other prompts": (
        {"chosen": [USER, ANSWER], "rejected": [SYSTEM, USER, WRONG]},
        "line 2: the conversations in 'chosen' and 'rejected' part before their last message",
    ),
    "other prompt beside them": (
        {"prompt": "3+3?", "chosen": [USER, ANSWER], "rejected": [USER, WRONG]},
        "begin otherwise than the column 'prompt'",
    ),
}


@pytest.mark.parametrize(("row", "expected"), BAD.values(), ids=BAD.keys())
def test_bad_pairs(row: dict[str, Any], expected: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        encoded(written(tmp_path, ROW, row))
    assert expected in str(caught.value)
    assert "pairs.jsonl, line 2" in str(caught.value)


def test_different_texts_of_the_same_tokens() -> None:
    tokenizer = characters()
    assert tokenizer.backend_tokenizer.normalizer is None
    from tokenizers.normalizers import Lowercase

    tokenizer.backend_tokenizer.normalizer = Lowercase()
    with pytest.raises(UserError, match="different texts of the same tokens"):
        encode_pair({"prompt": "a", "chosen": "Yes", "rejected": "yes"}, tokenizer)
