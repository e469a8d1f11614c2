"""Reading rows from files."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kedge.data.hub import load_dataset_rows
from kedge.data.rows import Rows
from kedge.errors import UserError


def load_rows(source: str | Path, *, split: str | None = None, count: int | None = None) -> Rows:
    r"""Read rows from a file, or from a dataset through the library ``datasets``.

    Args:
        source: a ``.jsonl``, ``.json`` (one list of objects) or ``.parquet`` file; otherwise what
            ``datasets`` loads: a folder, a name on the hub, or ``name:configuration``.
        split: a dataset's split; files have none.
        count: take this many rows from the start, all when left out.

    Returns:
        At least one row; ``Rows.place`` tells the file and line of each.

    Raises:
        UserError: the file is missing, empty, of another format or malformed (naming the line), the
            split does not exist, or an extra is not installed.
        RunError: a dataset could not be fetched.

    >>> import pathlib, tempfile
    >>> from kedge.data import load_rows
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = pathlib.Path(folder, "sums.jsonl")
    ...     _ = path.write_text('{"prompt": "2+2="}\n')
    ...     load_rows(path)
    [{'prompt': '2+2='}]
    """
    if count is not None and count < 1:
        raise UserError(f"{source}: count must be at least 1, not {count}")
    path = Path(source).expanduser()
    if names_dataset(path):
        rows = load_dataset_rows(str(source), split, path.is_dir())
    elif path.is_file():
        rows = _read_file(path, split)
    else:
        raise UserError(_missing(path))
    if not rows:
        raise UserError(f"{source}: no rows in it; give a file with at least one")
    return rows.first(count)


def names_dataset(source: str | Path) -> bool:
    """Whether ``load_rows`` reads a source through ``datasets``: it is no file, nor named like one.

    >>> names_dataset("openai/gsm8k:main"), names_dataset("prompts.jsonl")
    (True, False)
    """
    path = Path(source).expanduser()
    return not path.is_file() and path.suffix.lower() not in _READERS


def _read_file(path: Path, split: str | None) -> Rows:
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        known = ", ".join(_READERS)
        raise UserError(
            f"{path}: files with suffix {path.suffix!r} are not read; convert it to one of {known}"
        )
    if split is not None:
        raise UserError(
            f"{path}: split {split!r} does nothing for a file; leave it out, or name the file of the split"
        )
    try:
        return reader(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error


def _read_jsonl(path: Path) -> Rows:
    rows, numbers = [], []
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            place = f"{path}, line {number}"
            if not line.strip():
                continue
            rows.append(_object(_parse(line.strip(), place), place))
            numbers.append(number)
    return Rows(rows, str(path), "line", numbers)


def _read_json(path: Path) -> Rows:
    content = path.read_bytes()
    if not content.strip():
        return Rows([], str(path))
    try:
        value = json.loads(content)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        if isinstance(error, json.JSONDecodeError) and error.msg == "Extra data":
            raise UserError(
                f"{path}: several JSON values in one file; if it is one a line, name it .jsonl"
            ) from error
        raise _malformed(error, str(path)) from error
    if not isinstance(value, list):
        raise UserError(f"{path}: holds {_kind(value)}; a list of objects is expected: [{{…}}, {{…}}]")
    return Rows([_object(row, f"{path}, row {i}") for i, row in enumerate(value, start=1)], str(path))


def _read_parquet(path: Path) -> Rows:
    try:
        import pyarrow as arrow
        from pyarrow import parquet
    except ImportError as error:
        raise UserError(f"{path}: reading Parquet needs pyarrow: pip install 'kedge[datasets]'") from error
    try:
        return Rows(parquet.read_table(path).to_pylist(), str(path))
    except arrow.ArrowInvalid as error:
        raise UserError(f"{path}: not a valid Parquet file ({error})") from error


_READERS: dict[str, Callable[[Path], Rows]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
}


def _parse(line: bytes, place: str) -> Any:
    try:
        return json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise _malformed(error, place) from error


def _malformed(error: ValueError, place: str) -> UserError:
    if isinstance(error, json.JSONDecodeError):
        within = f"line {error.lineno}, column {error.colno}" if error.lineno > 1 else f"column {error.colno}"
        around = error.doc[max(0, error.pos - 20) : error.pos + 20]
        return UserError(f"{place}: not valid JSON: {error.msg} at {within}, near {around!r}")
    return UserError(f"{place}: not UTF-8 text ({error}); save the file as UTF-8")


def _object(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{place}: {_kind(value)} where an object with named columns is expected: {{…}}")
    return value


def _kind(value: Any) -> str:
    kinds = {list: "a list", str: "a string", dict: "an object", bool: "a boolean", type(None): "null"}
    return kinds.get(type(value), "a number")


def _missing(path: Path) -> str:
    if not path.parent.is_dir():
        return f"{path}: no such file; the folder {path.parent} does not exist"
    near = difflib.get_close_matches(path.name, [item.name for item in path.parent.iterdir()], n=3)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    return f"{path}: no such file{hint}"
