"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from kedge.errors import RunError

_PARTIAL = ".partial"  # being written: worthless after a kill
_PREVIOUS = ".previous"  # whole, moved aside while its successor takes its name
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def write_failure(error: Exception, path: Path) -> RunError:
    """Say which file could not be written, why, and what to do."""
    number = getattr(error, "errno", None)
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    # safetensors reports the operating system's error only in its text
    full = number in _FULL or any(f"os error {code}" in str(error).lower() for code in _FULL)
    remedy = "free some space (or raise the quota)" if full else "check the disk, the folder's permissions"
    return RunError(
        f"{path}: could not be written ({reason}). Nothing written before is damaged: {remedy}, "
        "then continue with resume=true."
    )


def write_file(path: Path, data: bytes) -> None:
    """Replace a file's content at once: readers and kills see the old bytes or the new ones.

    Raises:
        RunError: The disk is full or the folder cannot be written; the old content stays.
    """
    partial = _sibling(path, _PARTIAL)
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        _sync_directory(path.parent)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise write_failure(error, path) from error


@contextmanager
def atomic_directory(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Fill a folder that appears under its name only when it is whole and on the disk.

    The body writes into a hidden sibling; at the end every file and folder in it is flushed to the disk and
    the sibling takes the name ``path``, in place of an older folder of that name. If the body raises, the
    sibling is removed and the older folder stays. A kill at any moment leaves the older folder or the new
    one, at worst under a hidden name that the next writing of this folder, or ``recover_leftovers``, puts right.

    Args:
        path: The folder to make or replace; its parents are made if missing.

    Yields:
        The folder to write into.

    Raises:
        RunError: The disk is full or the folder cannot be written.

    >>> import tempfile
    >>> runs = Path(tempfile.mkdtemp())
    >>> with atomic_directory(runs / "step-000010") as folder:
    ...     _ = (folder / "weights").write_text("all of them")
    ...     (runs / "step-000010").exists()
    False
    >>> (runs / "step-000010" / "weights").read_text()
    'all of them'
    """
    target = Path(path)
    partial, previous = _sibling(target, _PARTIAL), _sibling(target, _PREVIOUS)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove(partial)  # what a killed write of this folder left; its neighbours may be at work
        _settle(previous, target)
        partial.mkdir()
        yield partial
        _sync_tree(partial)
        if target.exists():
            os.replace(target, previous)
        os.replace(partial, target)
        _sync_directory(target.parent)
    except (OSError, SafetensorError) as error:
        raise write_failure(error, target) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if target.exists():
            shutil.rmtree(previous, ignore_errors=True)


def recover_leftovers(folder: Path) -> None:
    """Put right what a killed write left in a run's folder: what is incomplete goes, what was moved aside comes back.

    Nothing else may be writing there.

    >>> import tempfile
    >>> run = Path(tempfile.mkdtemp())
    >>> (run / ".step-000010.partial").mkdir()
    >>> recover_leftovers(run)
    >>> list(run.iterdir())
    []
    """
    for partial in list(folder.rglob(f".*{_PARTIAL}")):
        _remove(partial)
    for previous in list(folder.rglob(f".*{_PREVIOUS}")):
        _settle(previous, previous.parent / previous.name[1 : -len(_PREVIOUS)])


def _settle(previous: Path, target: Path) -> None:
    """Give what was moved aside its name back, unless its successor has it."""
    if target.exists():
        _remove(previous)
    elif previous.exists():
        os.replace(previous, target)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _sibling(path: Path, suffix: str) -> Path:
    return path.parent / f".{path.name}{suffix}"


def _sync_tree(folder: Path) -> None:
    for root, _, names in os.walk(folder):
        for name in names:
            _sync(Path(root, name), os.O_RDONLY)
        _sync_directory(Path(root))


def _sync_directory(folder: Path) -> None:
    _sync(folder, os.O_RDONLY | os.O_DIRECTORY)


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
