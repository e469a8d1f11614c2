"""The run directory: config, metrics, samples, environment, log."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml

from kedge.errors import UserError
from kedge.runs import lines
from kedge.runs.atomic import recover_leftovers, write_file
from kedge.runs.sinks import Sink, check_sinks, open_sinks

CONFIG, METRICS, SAMPLES = "config.yaml", "metrics.jsonl", "samples.jsonl"
ENVIRONMENT, LOG = "environment.json", "log.txt"

# terminal escapes, then every control character but tab and line feed
_CONTROL = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)|[\x00-\x08\x0b-\x1f\x7f-\x9f]"
)


class RunDirectory:
    """A folder that holds everything one run leaves behind, open for writing.

    ``config.yaml`` (resolved), ``metrics.jsonl`` (one object a step), ``samples.jsonl``,
    ``environment.json``, ``log.txt``; checkpoints and the report live beside them. Every line is written at
    once: a kill loses at most the line being written, and a full disk damages nothing that was there.

    Attributes:
        path: The folder.
        resumed: Whether it held a run before it was opened.

    >>> import tempfile
    >>> with RunDirectory.create(Path(tempfile.mkdtemp()) / "run", {"seed": 0}, resume=False) as run:
    ...     run.metrics({"step": 1, "reward/mean": 0.5, "loss": float("nan")})
    ...     run.metrics({"step": 2, "reward/mean": 0.75})
    ...     run.truncate_after(1)
    >>> read_metrics(run.path)
    [{'step': 1, 'reward/mean': 0.5, 'loss': nan}]
    """

    def __init__(self, path: Path, *, resumed: bool, sinks: Iterable[Sink] = ()) -> None:
        self.path = path
        self.resumed = resumed
        self._sinks = list(sinks)

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        config: Mapping[str, Any],
        *,
        resume: bool,
        sinks: Sequence[str] = (),
    ) -> RunDirectory:
        """Make a run directory, or open the one that is there.

        Args:
            path: The folder; its parents are made if missing.
            config: The resolved configuration, of what YAML can hold.
            resume: Continue the run that is there. Where there is none, one is started and the log says so.
            sinks: Further places for the metrics: names of ``SINKS``.

        Raises:
            UserError: The folder exists and ``resume`` is false, or holds something else than a run; it
                cannot be made or written; a sink's package is not installed.
        """
        folder = Path(path)
        check_sinks(sinks)
        resumed = _open_folder(folder, resume)
        run = cls(folder, resumed=resumed)
        changed = run._record_config(config)
        if resumed:
            run.log("resumed" + (f" with other settings: {changed}" if changed else ""))
        else:
            run.log("started" + (" (resume=true, but there was no run to resume)" if resume else ""))
        run._sinks = open_sinks(sinks, folder, config)
        return run

    def metrics(self, row: Mapping[str, Any]) -> None:
        """Append one step's metrics to ``metrics.jsonl`` and hand them to the sinks.

        Args:
            row: ``step`` (a whole number) and named numbers (or tensors of one element). NaN and the
                infinities are written as null, since JSON has neither, and come back as NaN.

        Raises:
            ValueError: There is no ``step``, or a value is not a number.
            RunError: The line could not be written.
        """
        plain = {name: _number(name, value) for name, value in row.items()}
        step = plain.get("step")
        if not isinstance(step, int):
            raise ValueError(f"a row of metrics needs a whole-numbered 'step', found {step!r}")  # noqa: TRY004
        lines.append(self.path / METRICS, lines.encode([plain]))
        numbers = {name: value for name, value in plain.items() if name != "step"}
        for sink in list(self._sinks):
            self._guard(sink, lambda sink=sink: sink.metrics(step, numbers))

    def samples(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append samples to ``samples.jsonl``, all of them or, if the disk is full, none.

        Args:
            rows: ``step``, ``kind`` ("evaluation", or "skipped" with the number of the ``update``, from 1),
                ``prompt``, ``completion``; of responses also ``tokens``, ``reward``, ``rewards`` (by name),
                ``finished``; of evaluations ``kl`` (nats, one per token).

        Raises:
            RunError: The lines could not be written.
        """
        lines.append(self.path / SAMPLES, lines.encode(rows))

    def log(self, text: str) -> None:
        """Append a message to ``log.txt``: plain text with the local time, without terminal escapes."""
        now = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
        plain = _CONTROL.sub("", text.replace("\r\n", "\n").replace("\r", "\n")).strip("\n")
        message = plain.replace("\n", "\n    ")
        lines.append(self.path / LOG, f"{now}  {message}\n".encode(errors="backslashreplace"))

    def record_environment(self, entries: Mapping[str, Any]) -> None:
        """Write ``environment.json``; a resumed run keeps its first start and lists the later ones.

        Args:
            entries: What ``environment`` returns.
        """
        first = read_environment(self.path)
        if first:
            resumes = [*first.pop("resumes", []), dict(entries)]
            entries = {**first, "resumes": resumes}
        text = json.dumps(lines.strict(entries), indent=2, ensure_ascii=False)
        write_file(self.path / ENVIRONMENT, (text + "\n").encode(errors="backslashreplace"))

    def truncate_after(self, step: int, update: int = 0) -> None:
        """Forget metrics and samples of later steps, so that they can be made again from a checkpoint.

        Args:
            step: the last one that is kept.
            update: how many updates of the step behind it are done; their refused samples are kept.

        Raises:
            RunError: A file could not be rewritten; it then stays whole, as it was.
        """

        def stays(row: Mapping[str, Any]) -> bool:
            if row.get("kind") == "skipped" and row["step"] == step + 1:
                return bool(row.get("update", 1) <= update)
            return bool(row["step"] <= step)

        for name in (METRICS, SAMPLES):
            lines.keep(self.path / name, stays)
        for sink in list(self._sinks):
            self._guard(sink, lambda sink=sink: sink.truncate_after(step))

    def close(self) -> None:
        """Close the sinks; the files need no closing."""
        for sink in list(self._sinks):
            self._guard(sink, sink.close)
        self._sinks = []

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _record_config(self, config: Mapping[str, Any]) -> str:
        plain = json.loads(json.dumps(dict(config), default=str))
        changed = changed_settings(self.path, plain)
        text = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=110)
        write_file(self.path / CONFIG, text.encode(errors="backslashreplace"))
        return changed

    def _guard(self, sink: Sink, action: Any) -> None:
        """Drop a service that fails: it must not cost the run, whose local files are the truth."""
        try:
            action()
        except Exception as error:  # noqa: BLE001 (any service, any error)
            self._sinks.remove(sink)
            self.log(f"warning: the sink {sink.name!r} failed and is no longer used: {error!r}")


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, int | float]]:
    """Read a run's metrics in the order written; null comes back as NaN, a torn last line is left out.

    Raises:
        UserError: There is no such run, or a line is not JSON (its number is in the message).
    """
    rows = _read(path, METRICS)
    return [{name: math.nan if value is None else value for name, value in row.items()} for row in rows]


def read_samples(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Read a run's samples in the order written; a torn last line is left out.

    Raises:
        UserError: There is no such run, or a line is not JSON (its number is in the message).
    """
    rows = _read(path, SAMPLES)
    for row in rows:
        row["kl"] = [math.nan if value is None else value for value in row.get("kl") or []]
    return rows


def read_config(path: str | os.PathLike[str], name: str = CONFIG) -> dict[str, Any]:
    """Read a run's resolved configuration; empty if it has none yet.

    Args:
        path: The run directory.
        name: The file in it.

    Raises:
        UserError: The file is not YAML.
    """
    file = Path(path) / name
    if not file.exists():
        return {}
    try:
        config = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: not YAML ({error}); repair it or start under another name.") from error
    return config if isinstance(config, dict) else {}


def changed_settings(path: str | os.PathLike[str], config: Mapping[str, Any]) -> str:
    """Say what a configuration would change in the one that a run has recorded; empty if it has none, or nothing.

    Args:
        path: The run directory.
        config: Of what YAML can hold.
    """
    before = read_config(path)
    return (
        "; ".join(_differences(before, json.loads(json.dumps(dict(config), default=str)))) if before else ""
    )


def read_environment(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read what a run was made with; empty if it has not been recorded yet.

    Raises:
        UserError: The file is not JSON.
    """
    file = Path(path) / ENVIRONMENT
    if not file.exists():
        return {}
    try:
        entries = json.loads(file.read_bytes())
    except ValueError as error:
        raise UserError(f"{file}: not JSON ({error}); remove it, the next start writes it again.") from error
    return entries if isinstance(entries, dict) else {}


def _read(path: str | os.PathLike[str], name: str) -> list[dict[str, Any]]:
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such run directory.")
    return lines.read(folder / name) if (folder / name).exists() else []


def _open_folder(folder: Path, resume: bool) -> bool:
    """Make the folder or take the one that is there; returns whether it held a run."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir()
    except FileExistsError as error:
        if not folder.is_dir():
            in_the_way = folder if folder.exists() else folder.parent
            raise UserError(f"{in_the_way}: a file is in the way; choose another name.") from error
        if not resume:
            raise UserError(
                f"{folder}: exists already; continue it with resume=true or choose another name."
            ) from error
    except OSError as error:
        raise UserError(f"{folder}: cannot be made ({error.strerror}); choose another folder.") from error
    if not os.access(folder, os.W_OK | os.X_OK, effective_ids=True):
        raise UserError(f"{folder}: cannot be written; change its permissions or choose another folder.")
    recover_leftovers(folder)
    held = sorted(entry.name for entry in folder.iterdir())
    if held and CONFIG not in held:
        raise UserError(
            f"{folder}: holds no run (no {CONFIG}, but {held[0]}); choose another name to start one."
        )
    for name in (METRICS, SAMPLES, LOG):
        lines.drop_torn_tail(folder / name)
    return bool(held)


def _number(name: str, value: Any) -> int | float | None:
    plain = value.item() if hasattr(value, "item") else value
    if plain is None or isinstance(plain, int | float):
        return plain if not isinstance(plain, bool) else int(plain)
    raise ValueError(f"metric {name!r} must be a number, found {value!r}")


def _differences(before: Any, after: Any, key: str = "") -> list[str]:
    if isinstance(before, dict) and isinstance(after, dict):
        names = [*before, *(name for name in after if name not in before)]
        return [
            line
            for name in names
            for line in _differences(before.get(name), after.get(name), f"{key}.{name}" if key else str(name))
        ]
    return [] if before == after else [f"{key}: {before!r} → {after!r}"]
