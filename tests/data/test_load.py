from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as arrow
import pytest
from pyarrow import parquet

from kedge.data import Rows, load_rows
from kedge.errors import RunError, UserError

FIXTURE = Path(__file__).parent / "gsm8k_like.jsonl"
ROWS: list[dict[str, Any]] = [{"prompt": "1+1=", "answer": 2}, {"prompt": "2+2=", "answer": 4}]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    parquet.write_table(arrow.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    return tmp_path


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.parquet"])
def test_every_format_gives_the_same_rows(folder: Path, name: str) -> None:
    assert load_rows(folder / name) == ROWS
    assert load_rows(str(folder / name), count=1) == ROWS[:1]


def test_places_are_lines_of_the_file_also_past_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "gaps.jsonl"
    path.write_text('\n{"a": 1}\n\n{"a": 2}\n')
    rows = load_rows(path)
    assert [rows.place(i) for i in range(2)] == [f"{path}, line 2", f"{path}, line 4"]
    assert load_rows(path, count=1).place(0) == f"{path}, line 2"


def test_the_shipped_rows_have_the_columns_of_gsm8k() -> None:
    rows = load_rows(FIXTURE)
    assert [sorted(row) for row in rows] == [["answer", "question"]] * 3
    assert "\n#### 19" in rows[0]["answer"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1}\n{"a": 2\n', r"line 2: not valid JSON: .* column 8, near"),
        (b'{"a": 1}\n\n{"a" 2}\n', r"line 3: not valid JSON"),
        (b'{"a": 1}\n[1, 2]\n', r"line 2: a list where an object"),
        (b'{"a": 1}\n"text"\n', r"line 2: a string where an object"),
        (b'{"a": 1}\n{"a": "\xff"}\n', r"line 2: not UTF-8"),
        (b"", r"no rows in it"),
        (b"\n\n", r"no rows in it"),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        load_rows(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"a": 1}\n{"a": 2}\n', "name it .jsonl"),
        ('{"a": 1}', "holds an object; a list of objects"),
        ("[1]", "row 1: a number where an object"),
        ('[{"a": 1},\n {"a": }]', "not valid JSON: .* line 2, column 8"),
        ("", "no rows in it"),
        ("[]", "no rows in it"),
    ],
)
def test_malformed_json(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        load_rows(path)


def test_malformed_parquet(tmp_path: Path) -> None:
    path = tmp_path / "bad.parquet"
    path.write_bytes(b"no parquet at all")
    with pytest.raises(UserError, match="not a valid Parquet file"):
        load_rows(path)


def test_missing_files_name_what_is_near(folder: Path) -> None:
    with pytest.raises(UserError, match=r"rwos\.jsonl: no such file; did you mean rows\.json"):
        load_rows(folder / "rwos.jsonl")
    with pytest.raises(UserError, match=r"the folder .* does not exist"):
        load_rows(folder / "elsewhere" / "rows.jsonl")


def test_other_files_splits_and_counts_are_refused(folder: Path) -> None:
    (folder / "rows.csv").write_text("a,b\n")
    with pytest.raises(
        UserError, match=r"suffix '.csv' are not read; convert it to one of .jsonl, .json, .parquet"
    ):
        load_rows(folder / "rows.csv")
    with pytest.raises(UserError, match="split 'train' does nothing for a file"):
        load_rows(folder / "rows.jsonl", split="train")
    with pytest.raises(UserError, match="count must be at least 1"):
        load_rows(folder / "rows.jsonl", count=0)


def test_an_unreadable_file_is_a_clear_error(folder: Path) -> None:
    (folder / "rows.jsonl").chmod(0)
    try:
        (folder / "rows.jsonl").read_bytes()
    except PermissionError:
        with pytest.raises(UserError, match="cannot be read: Permission denied"):
            load_rows(folder / "rows.jsonl")
    else:
        pytest.skip("run as root, who may read everything")


def test_saved_datasets_with_and_without_splits(tmp_path: Path) -> None:
    whole = datasets.Dataset.from_list(ROWS)
    whole.save_to_disk(str(tmp_path / "single"))
    datasets.DatasetDict({"train": whole, "test": whole.select([1])}).save_to_disk(str(tmp_path / "split"))
    datasets.DatasetDict({"train": whole}).save_to_disk(str(tmp_path / "only"))
    assert load_rows(tmp_path / "single") == ROWS
    assert load_rows(tmp_path / "only") == ROWS
    test = load_rows(tmp_path / "split", split="test")
    assert test == ROWS[1:]
    assert test.place(0) == f"{tmp_path / 'split'} [test], row 1"
    with pytest.raises(UserError, match=r"which split.* train, test"):
        load_rows(tmp_path / "split")
    with pytest.raises(UserError, match="no split 'dev'; there are train, test"):
        load_rows(tmp_path / "split", split="dev")
    with pytest.raises(UserError, match="it holds a single one"):
        load_rows(tmp_path / "single", split="train")


def test_an_unknown_name_is_one_clear_error() -> None:
    with pytest.raises((UserError, RunError), match="nobody/nothing-of-the-kind: ") as caught:
        load_rows("nobody/nothing-of-the-kind")
    assert "\n" not in str(caught.value)


def test_without_the_extra_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    for name in ("datasets", "pyarrow"):
        monkeypatch.setitem(__import__("sys").modules, name, None)
    with pytest.raises(UserError, match=r"pip install 'kedge\[datasets\]'"):
        load_rows("openai/gsm8k:main")
    with pytest.raises(UserError, match=r"pip install 'kedge\[datasets\]'"):
        load_rows(folder / "rows.parquet")


def test_rows_given_from_python_have_places_too() -> None:
    assert Rows(ROWS).place(1) == "the rows given, row 2"
