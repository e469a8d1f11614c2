"""One process at a time in a run's folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from kedge.errors import UserError


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keep a folder for this process until the block ends, or the process does, however it ends.

    Where the file system has no locks nothing is kept, and nothing refused.

    Raises:
        UserError: another process has it.

    >>> import tempfile
    >>> with held(Path(tempfile.mkdtemp())):
    ...     pass
    """
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(
            f"{folder}: another process is at work on this run; let it end or stop it, then go on with resume=true"
        ) from None
    except NotImplementedError:
        pass
    try:
        yield
    finally:
        lock.release()
