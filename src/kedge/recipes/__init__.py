"""The recipes that ship with Kedge."""

from __future__ import annotations

import difflib
import shutil
from pathlib import Path

from kedge.errors import UserError

_FOLDER = Path(__file__).parent


def names() -> list[str]:
    """Name every recipe.

    >>> "prose" in names()
    True
    """
    return sorted(file.stem for file in _FOLDER.glob("*.yaml"))


def path(name: str) -> Path:
    """Find a recipe's file."""
    file = _FOLDER / f"{name}.yaml"
    if not file.is_file() or name not in names():
        near = difflib.get_close_matches(name, names(), n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(names())}"
        raise UserError(f"{name}: no such file, and no recipe of that name ships with Kedge; {hint}")
    return file


def find(given: str | Path) -> Path:
    """Take a file as it is; a bare name without a file is a recipe that ships.

    >>> find("mine.yaml").name, find("prose") == path("prose")
    ('mine.yaml', True)
    """
    file = Path(given)
    if file.is_file() or file.suffix in (".yaml", ".yml") or len(file.parts) > 1:
        return file
    return path(str(given))


def caption(name: str) -> str:
    """Give the first line of a recipe, which says what it does."""
    return path(name).read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")


def copy(name: str, folder: Path) -> Path:
    """Copy a recipe into a folder, to be changed."""
    target = folder / f"{name}.yaml"
    if target.exists():
        raise UserError(f"{target}: exists already; move it away or copy into another folder")
    try:
        shutil.copyfile(path(name), target)
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror})") from None
    return target
