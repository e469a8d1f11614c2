"""The files of a comparison: ``measure.json``, ``tokens.parquet``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kedge.errors import UserError
from kedge.measure.questions import QUESTIONS
from kedge.measure.result import Comparison
from kedge.runs import atomic_directory
from kedge.runs.audit import SUMMARY, TOKENS


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
    """Refuse a folder that holds something else than a measurement, since writing replaces the whole of it.

    Raises:
        UserError: it is a file, or a folder of other things.
    """
    if directory.is_dir() and ((directory / SUMMARY).is_file() or not any(directory.iterdir())):
        return
    if directory.exists():
        raise UserError(
            f"{directory} exists and holds no measurement, which would replace it: give another folder for the result"
        )


def write(comparison: Comparison, directory: Path) -> None:
    """Write a comparison into a folder, which appears whole or not at all; an older one is replaced.

    Raises:
        UserError: pyarrow is not installed.
        RunError: the folder cannot be written.
    """
    require_parquet()
    with atomic_directory(directory) as folder:
        text = json.dumps(comparison.summary(), ensure_ascii=False, indent=1, allow_nan=False)
        (folder / SUMMARY).write_text(text + "\n", encoding="utf-8", errors="backslashreplace")
        _write_tokens(comparison, folder / TOKENS)


def _write_tokens(comparison: Comparison, path: Path) -> None:
    import pyarrow as arrow
    from pyarrow import parquet

    schema = None
    writer = None
    for name in QUESTIONS:
        answer = comparison.answers.get(name)
        if answer is None:
            continue
        columns: dict[str, Any] = {
            "question": arrow.array([name] * answer.tokens.count).dictionary_encode(),
        }
        for column, values in answer.tokens.columns().items():
            whole = not values.is_floating_point()
            columns[column] = arrow.array((values.int() if whole else values).numpy())
        for column, texts in answer.texts.items():
            safe = [text.encode("utf-8", "backslashreplace").decode() for text in texts]
            columns[column] = arrow.array(safe, arrow.string()).dictionary_encode()
        table = arrow.table(columns)
        if writer is None:
            schema = table.schema
            writer = parquet.ParquetWriter(path, schema)
        writer.write_table(table.cast(schema))
    if writer is not None:
        writer.close()
