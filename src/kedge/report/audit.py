"""An audit read into memory: the summary of a comparison of two models, its tokens by question."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kedge.errors import UserError
from kedge.runs.audit import TOKENS, read_summary

BOTH = {"reverse_kl": "KL(policy ‖ reference)", "forward_kl": "KL(reference ‖ policy)"}
"""Both directions, by the names that files have for them."""


@dataclass(frozen=True)
class Audit:
    """What a folder of ``kedge measure`` holds.

    Attributes:
        path: The folder.
        summary: The content of ``measure.json``.
        tokens: The rows of ``tokens.parquet`` of each question, a table of pyarrow.
    """

    path: Path
    summary: Mapping[str, Any]
    tokens: Mapping[str, Any]

    @property
    def questions(self) -> Mapping[str, Mapping[str, Any]]:
        """The questions that were asked, by name, in their order."""
        found: Mapping[str, Mapping[str, Any]] = self.summary["questions"]
        return found


def read_audit(directory: Path) -> Audit:
    """Read the folder that a comparison was written to.

    Raises:
        UserError: It holds none, a file in it is damaged, or pyarrow is not installed.
    """
    summary = read_summary(directory)
    file = directory / TOKENS
    try:
        from pyarrow import ArrowInvalid, compute, parquet
    except ImportError as error:
        raise UserError(
            f"{file} is read with pyarrow, which is not installed: pip install 'kedge[measure]'"
        ) from error
    try:
        table = parquet.read_table(file)
    except (OSError, ArrowInvalid) as error:
        raise UserError(f"{file}: cannot be read ({error}); measure again") from error
    return Audit(
        path=directory,
        summary=summary,
        tokens={name: table.filter(compute.field("question") == name) for name in summary["questions"]},
    )


def number(value: Any) -> float:
    """Read a number of ``measure.json``, which writes infinities as words and NaN as null.

    >>> number(0.5), number("-Infinity"), number(None)
    (0.5, -inf, nan)
    """
    return math.nan if value is None else float(value)


def rounded(value: float | None, digits: int = 4) -> float | None:
    """Round to significant digits; None where a chart has nothing to show.

    >>> rounded(0.123456), rounded(math.inf)
    (0.1235, None)
    """
    return float(f"{value:.{digits}g}") if value is not None and math.isfinite(value) else None


def sizes(tokens: Any) -> Sequence[int]:
    """Count the tokens of each response, in their order: rows of a response stand together."""
    from pyarrow import compute

    return [
        int(run["counts"]) for run in compute.value_counts(tokens["response"].combine_chunks()).to_pylist()
    ]
