"""The folder that ``kedge measure`` leaves: the names of its files, the reading of its summary."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kedge.errors import UserError

FORMAT = "kedge-measure/1"
"""Of ``measure.json``; the number grows when a key changes its meaning."""
SUMMARY = "measure.json"
TOKENS = "tokens.parquet"
PAGE = "measure.html"


def read_summary(directory: str | Path) -> dict[str, Any]:
    """Read ``measure.json``.

    Raises:
        UserError: there is none, it is damaged, or another version wrote it.
    """
    path = Path(directory) / SUMMARY
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise UserError(f"{path}: damaged ({error}); measure again") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise UserError(f"{path}: not of the format {FORMAT}; measure again with this version")
    return found
