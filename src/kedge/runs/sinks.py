"""Further places for metrics (TensorBoard, Weights & Biases, trackio): opt-in, never needed."""

from __future__ import annotations

import importlib.util
import math
import re
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from kedge.errors import UserError
from kedge.runs.atomic import write_file


@runtime_checkable
class Sink(Protocol):
    """What a place for metrics must do.

    Attributes:
        name: How the configuration calls it.
    """

    name: str

    def metrics(self, step: int, row: Mapping[str, int | float | None]) -> None:
        """Take one step's numbers; None stands for a number that was not recorded."""

    def truncate_after(self, step: int) -> None:
        """Forget later steps: they will be sent again."""

    def close(self) -> None:
        """Send what is waiting and let go."""


class TensorBoard:
    """Event files in the run directory's ``tensorboard/``.

    Args:
        directory: The run directory.
        config: The resolved configuration; TensorBoard shows it as text.
    """

    name = "tensorboard"

    def __init__(self, directory: Path, config: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._folder = directory / "tensorboard"
        self._open = SummaryWriter
        self._writer = SummaryWriter(str(self._folder))
        self._writer.add_text("config", "\n".join(f"    {key}: {value}" for key, value in config.items()))

    def metrics(self, step: int, row: Mapping[str, int | float | None]) -> None:
        """Write one step's scalars and flush them to the file."""
        for name, value in _finite(row).items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def truncate_after(self, step: int) -> None:
        """Open a new event file that tells TensorBoard to drop what older ones hold of later steps."""
        self._writer.close()
        self._writer = self._open(str(self._folder), purge_step=step + 1)

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()


class WandB:
    """A run of the project ``kedge`` at Weights & Biases, continued by a resume.

    Steps sent again after a resume are equal to the first ones, and W&B keeps the first.

    Args:
        directory: The run directory; W&B's own files go to its ``wandb/``.
        config: The resolved configuration.
    """

    name = "wandb"

    def __init__(self, directory: Path, config: Mapping[str, Any]) -> None:
        import wandb

        self._run = wandb.init(
            project="kedge",
            name=directory.name,
            id=_identity(directory),
            resume="allow",
            dir=str(directory),
            config=dict(config),
            settings={"console": "off"},
        )

    def metrics(self, step: int, row: Mapping[str, int | float | None]) -> None:
        """Log one step."""
        self._run.log(_finite(row), step=step)

    def truncate_after(self, step: int) -> None:
        """Nothing to do: W&B ignores steps that it has."""

    def close(self) -> None:
        """Send what is waiting and finish the run."""
        self._run.finish()


class Trackio:
    """A run of the local trackio project ``kedge``, continued by a resume.

    Args:
        directory: The run directory.
        config: The resolved configuration.
    """

    name = "trackio"

    def __init__(self, directory: Path, config: Mapping[str, Any]) -> None:
        import trackio

        self._run = trackio.init(
            project="kedge", name=_identity(directory), config=dict(config), resume="allow"
        )

    def metrics(self, step: int, row: Mapping[str, int | float | None]) -> None:
        """Log one step."""
        self._run.log(_finite(row), step=step)

    def truncate_after(self, step: int) -> None:
        """Nothing to do: trackio keeps both, and they are equal."""

    def close(self) -> None:
        """Write what is waiting and finish the run."""
        self._run.finish()


SINKS: Mapping[str, type[TensorBoard] | type[WandB] | type[Trackio]] = {
    sink.name: sink for sink in (TensorBoard, WandB, Trackio)
}


def check_sinks(names: Sequence[str]) -> None:
    """Refuse unknown sinks and those whose package is missing, before anything is written.

    Raises:
        UserError: The message names the choices, or the extra to install.

    >>> check_sinks(["tensorbord"])
    Traceback (most recent call last):
    kedge.errors.UserError: sinks: unknown sink 'tensorbord'; choose from tensorboard, wandb, trackio.
    """
    for name in names:
        if name not in SINKS:
            raise UserError(f"sinks: unknown sink {name!r}; choose from {', '.join(SINKS)}.")
        if importlib.util.find_spec(name) is None:
            raise UserError(
                f"sinks: {name!r} needs a package that is not installed; pip install 'kedge[{name}]'."
            )


def open_sinks(names: Sequence[str], directory: Path, config: Mapping[str, Any]) -> list[Sink]:
    """Open sinks by name.

    Args:
        names: From ``SINKS``.
        directory: The run directory.
        config: The resolved configuration.

    Raises:
        UserError: A name is unknown, its package is not installed, or it cannot be opened.
    """
    check_sinks(names)
    return [_open_sink(name, directory, config) for name in names]


def _open_sink(name: str, directory: Path, config: Mapping[str, Any]) -> Sink:
    try:
        return SINKS[name](directory, config)
    except Exception as error:
        raise UserError(
            f"sinks: {name!r} could not be opened ({error}); put that right or leave it out, "
            f"then start again with resume=true."
        ) from error


def _finite(row: Mapping[str, int | float | None]) -> dict[str, int | float]:
    return {name: value for name, value in row.items() if value is not None and math.isfinite(value)}


def _identity(directory: Path) -> str:
    """Name the run: the same over its resumes, in characters that every service takes."""
    file = directory / ".sink-identity"
    if not file.exists():
        plain = re.sub(r"[^A-Za-z0-9_-]", "-", directory.name)[:60]
        write_file(file, f"{plain}-{secrets.token_hex(4)}".encode())
    return file.read_text()
