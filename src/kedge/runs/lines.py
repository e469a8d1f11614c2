"""Files of one JSON object a line, appended to whole and read without torn lines."""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from kedge.errors import UserError
from kedge.runs.atomic import write_failure, write_file


def append(path: Path, data: bytes) -> None:
    """Append bytes at once: either all of them are in the file afterwards, or none.

    Raises:
        RunError: The disk is full or the file cannot be written; what was there before stays as it was.
    """
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise write_failure(error, path) from error
    try:
        status = os.fstat(descriptor)
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(descriptor, rest) :]
        except OSError as error:
            if stat.S_ISREG(status.st_mode):
                os.ftruncate(descriptor, status.st_size)
            raise write_failure(error, path) from error
    finally:
        os.close(descriptor)


def encode(rows: Iterable[Mapping[str, Any]]) -> bytes:
    r"""Encode rows as strict JSON, a line each; NaN and the infinities, which JSON lacks, become null.

    >>> encode([{"step": 1, "loss": float("nan"), "text": "déjà\nvu"}]).decode()
    '{"step": 1, "loss": null, "text": "déjà\\nvu"}\n'
    """
    return b"".join(_encode_row(row) + b"\n" for row in rows)


def _encode_row(row: Mapping[str, Any]) -> bytes:
    plain = strict(row)
    try:
        return json.dumps(plain, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError:  # half a surrogate pair, as byte-level decoding can leave: escape it
        return json.dumps(plain, allow_nan=False).encode()


def strict(value: Any) -> Any:
    """Replace NaN and the infinities, at any depth, by None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): strict(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [strict(entry) for entry in value]
    return value


def read(path: Path) -> list[dict[str, Any]]:
    """Read a file of lines; a last line without its line feed was torn by a kill and is left out.

    Raises:
        UserError: A complete line holds no JSON object; the message has its number.
    """
    rows = []
    for number, line in enumerate(_complete(path).split(b"\n")[:-1], start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            message = f"{path}, line {number}: not JSON ({error}); remove or repair that line."
            raise UserError(message) from error
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number}: not a JSON object; remove or repair that line.")
        rows.append(row)
    return rows


def keep(path: Path, wanted: Callable[[dict[str, Any]], bool]) -> None:
    """Rewrite a file, in one go, with the lines whose object is wanted; their bytes stay as they are."""
    if not path.exists():
        return
    lines = _complete(path).split(b"\n")[:-1]
    kept = [line for line, row in zip(lines, read(path), strict=True) if wanted(row)]
    write_file(path, b"".join(line + b"\n" for line in kept))


def drop_torn_tail(path: Path) -> None:
    """Cut the last line off if a kill left it without its line feed."""
    if path.exists() and len(_complete(path)) != path.stat().st_size:
        os.truncate(path, len(_complete(path)))


def _complete(path: Path) -> bytes:
    data = path.read_bytes()
    return data[: data.rfind(b"\n") + 1]
