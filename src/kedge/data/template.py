"""From columns to prompts and completions."""

from __future__ import annotations

import difflib
import string
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from kedge.data.rows import Row, Rows
from kedge.errors import UserError

Messages: TypeAlias = list[dict[str, Any]]
Text: TypeAlias = str | Messages

DEFAULT_PROMPT = "{prompt}"


def format_rows(rows: Sequence[Row], *, prompt: str = DEFAULT_PROMPT, completion: str | None = None) -> Rows:
    r"""Fill the formats with the columns of every row.

    A format that is one column in braces takes its value as it is, chat messages too; otherwise columns
    stand in braces inside text, and literal braces are doubled. Rows that have ``messages`` instead of
    ``prompt``, as chat data often do, are split before the last assistant message when the prompt's
    format is the default.

    Args:
        rows: as `load_rows` gives them.
        prompt: e.g. ``"Question: {question}\nAnswer:"``.
        completion: e.g. ``" {answer}"``; None leaves the column ``completion`` as it is, if there is one.

    Returns:
        The rows, each with ``prompt`` and, where asked for, ``completion``, beside its own columns.

    Raises:
        UserError: a format is malformed, or a row lacks a column or has a value that does not fit.

    >>> from kedge.data import format_rows
    >>> rows = [{"question": "2+2?", "answer": "4"}]
    >>> rows = format_rows(rows, prompt="Q: {question}\nA:", completion=" {answer}")
    >>> rows[0]["prompt"], rows[0]["completion"]
    ('Q: 2+2?\nA:', ' 4')
    """
    placed = rows if isinstance(rows, Rows) else Rows(rows)
    if prompt == DEFAULT_PROMPT:
        placed = placed.with_rows(
            _split_messages(row, placed.place(index)) if "prompt" not in row and "messages" in row else row
            for index, row in enumerate(placed)
        )
    return fill_formats(
        placed, {"prompt": prompt, **({"completion": completion} if completion is not None else {})}
    )


def fill_formats(rows: Rows, formats: Mapping[str, str]) -> Rows:
    """Give every row the columns that ``formats`` name, each filled with the row's own; see `format_rows`.

    >>> fill_formats(Rows([{"a": "1", "b": "2"}]), {"sum": "{a}+{b}="})
    [{'a': '1', 'b': '2', 'sum': '1+2='}]
    """
    ready = {key: _Format(text, key) for key, text in formats.items()}
    return rows.with_rows(
        {**row, **{key: form.fill(row, rows.place(index)) for key, form in ready.items()}}
        for index, row in enumerate(rows)
    )


class _Format:
    """A format string over columns."""

    def __init__(self, text: str, key: str) -> None:
        self.text, self.key = text, key
        try:
            parts = list(string.Formatter().parse(text))
        except ValueError as error:
            raise UserError(
                f"{key} format {text!r}: {error}; write literal braces doubled: {{{{ }}}}"
            ) from error
        fields = [(name, spec, conversion) for _, name, spec, conversion in parts if name is not None]
        for name, spec, conversion in fields:
            if not name.isidentifier() or spec or conversion:
                raise UserError(
                    f"{key} format {text!r}: {{{name}}} is not a column's name; write plain names in braces, "
                    "and literal braces doubled: {{ }}"
                )
        self.columns = [name for name, _, _ in fields]
        self.whole = len(parts) == 1 and len(fields) == 1 and not parts[0][0]

    def fill(self, row: Row, place: str) -> Text:
        values = {name: self._value(row, name, place) for name in self.columns}
        if self.whole:
            return values[self.columns[0]]
        for name, value in values.items():
            if not isinstance(value, str):
                raise UserError(
                    f"{place}: column {name!r} holds chat messages, which do not fit inside the text of the "
                    f"{self.key} format {self.text!r}; use the format '{{{name}}}' alone"
                )
        return self.text.format_map(values)

    def _value(self, row: Row, name: str, place: str) -> Text:
        if name not in row:
            near = difflib.get_close_matches(name, list(row), n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise UserError(
                f"{place}: no column {name!r}, which the {self.key} format {self.text!r} needs{hint} "
                f"Its columns: {', '.join(row) or 'none'}"
            )
        value = row[name]
        if isinstance(value, str):
            return value
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return str(value)
        return check_messages(value, f"{place}, column {name!r}")


def check_messages(value: Any, place: str) -> Messages:
    """Make sure that a value is chat messages: a non-empty list of ``{"role": str, "content": …}``.

    Raises:
        UserError: it is something else.

    >>> from kedge.data import check_messages
    >>> check_messages([{"role": "user", "content": "2+2?"}], "line 1")
    [{'role': 'user', 'content': '2+2?'}]
    """
    if not isinstance(value, list) or not value:
        raise UserError(f"{place}: {value!r:.60} is neither text nor a list of chat messages")
    for message in value:
        if (
            not isinstance(message, dict)
            or not isinstance(message.get("role"), str)
            or "content" not in message
        ):
            raise UserError(f'{place}: {message!r:.60} is not a chat message {{"role": …, "content": …}}')
    return value


def _split_messages(row: Row, place: str) -> Row:
    messages = check_messages(row["messages"], f"{place}, column 'messages'")
    rest = {name: value for name, value in row.items() if name != "messages"}
    if messages[-1]["role"] != "assistant":
        return {**rest, "prompt": messages}
    if len(messages) == 1:
        raise UserError(f"{place}: the messages hold an answer and no prompt before it")
    return {**rest, "prompt": messages[:-1], "completion": messages[-1:]}
