"""The files of a comparison: ``measure.json``, ``tokens.parquet``."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

from kedge.errors import RunError, UserError
from kedge.measure.questions import QUESTIONS
from kedge.measure.result import Comparison
from kedge.measure.table import TokenTable
from kedge.runs import atomic_directory
from kedge.runs.audit import PAGE, SUMMARY, TOKENS


def require_parquet() -> None:
    """Refuse to begin what could not be written.

    Raises:
        UserError: the library is not installed.
    """
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"{TOKENS} is written with pyarrow, which is not installed: pip install 'kedge[measure]'"
        ) from error


def require_replaceable(directory: Path) -> None:
    """Refuse a folder that holds anything but a measurement, since writing replaces the whole of it.

    Raises:
        UserError: it is a file, or a folder of other things, or cannot be replaced.
    """
    if not directory.exists():
        return
    found = {path.name for path in directory.iterdir()} if directory.is_dir() else {directory.name}
    others = sorted(found - {SUMMARY, TOKENS, PAGE})
    if others or (found and SUMMARY not in found):
        what = f"holds {others[0]!r}, too" if others and SUMMARY in found else "holds no measurement"
        raise UserError(
            f"{directory} exists and {what}, which the result would replace: give another folder for the result"
        )
    if os.path.ismount(directory) or Path.cwd().resolve().is_relative_to(directory.resolve()):
        raise UserError(
            f"{directory} is mounted, or the folder that this process works in, and cannot be replaced: give a folder "
            "inside it for the result"
        )


def require_writable(directory: Path) -> None:
    """Refuse a folder that cannot be made, before anything is measured; nothing is left behind.

    Raises:
        UserError: a part of its path is a file, or may not be written.
    """
    try:
        directory.exists()  # a name that no file can have
        above = next(parent for parent in directory.absolute().parents if parent.exists())
        with tempfile.TemporaryFile(dir=above):
            pass
    except OSError as error:
        raise UserError(
            f"{directory} cannot be written ({error.strerror or error}): give another folder for the result, or change "
            "the permissions"
        ) from error


def write(comparison: Comparison, directory: Path) -> None:
    """Write a comparison into a folder, which appears whole or not at all; an older one is replaced.

    Raises:
        UserError: pyarrow is not installed.
        RunError: the folder cannot be written.
    """
    require_parquet()
    answers = {name: comparison.answers[name] for name in QUESTIONS if name in comparison.answers}
    with _folder(directory) as folder:
        text = json.dumps(comparison.summary(), ensure_ascii=False, indent=1, allow_nan=False)
        (folder / SUMMARY).write_text(text + "\n", encoding="utf-8", errors="backslashreplace")
        _write((_columns(name, each.tokens, each.texts) for name, each in answers.items()), folder / TOKENS)


def write_tokens(tables: dict[str, TokenTable], directory: Path) -> None:
    """Write the values of tokens alone, by the name of their question, where there are no figures of them.

    Raises:
        UserError: pyarrow is not installed.
        RunError: the folder cannot be written.
    """
    require_parquet()
    with _folder(directory) as folder:
        _write((_columns(name, table, {}) for name, table in tables.items()), folder / TOKENS)


@contextmanager
def _folder(directory: Path) -> Iterator[Path]:
    try:
        with atomic_directory(directory) as folder:
            yield folder
    except RunError as error:
        raise RunError(
            f"{directory} could not be written ({error.__cause__ or error}): free some space, or give another folder, "
            "then measure again"
        ) from error


def _columns(question: str, tokens: TokenTable, texts: dict[str, list[str]]) -> Any:
    """Put the values of a question's tokens into a table of pyarrow."""
    import pyarrow as arrow

    columns: dict[str, Any] = {"question": arrow.array([question] * tokens.count).dictionary_encode()}
    for column, values in tokens.columns().items():
        whole = not values.is_floating_point()
        columns[column] = arrow.array((values.int() if whole else values).numpy())
    for column, words in texts.items():
        safe = [text.encode("utf-8", "backslashreplace").decode() for text in words]
        columns[column] = arrow.array(safe, arrow.string()).dictionary_encode()
    return arrow.table(columns)


def _write(tables: Iterator[Any], path: Path) -> None:
    from pyarrow import parquet

    first = next(tables)
    with parquet.ParquetWriter(path, first.schema) as writer:
        for table in chain([first], tables):
            writer.write_table(table.cast(first.schema))
