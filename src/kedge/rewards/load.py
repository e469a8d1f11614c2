"""Finding reward functions by name."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import pkgutil
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from kedge.errors import UserError


def load_reward(
    spec: str, *, folder: str | Path = ".", loaded: dict[str, ModuleType] | None = None
) -> Callable[..., Any]:
    """Import a reward function.

    Args:
        spec: ``module:function`` or ``path.py:function``.
        folder: what relative paths start from.
        loaded: files that have been run already, by name of their module; one that is not there is run, and added.
            Functions of one file are then of one module, as process pools that fork want them.

    Returns:
        The function, not called yet.

    Raises:
        UserError: the form is wrong, the file, module or function does not exist (close matches are
            named), or importing it fails.

    >>> from kedge.rewards import load_reward
    >>> load_reward("kedge.tasks.sums:correct").__name__
    'correct'
    """
    place, colon, name = spec.rpartition(":")
    if not colon or not place or not name:
        raise UserError(f"reward {spec!r}: write it as module:function or path.py:function")
    if place.endswith(".py"):
        module = _from_file(Path(folder, place).expanduser(), spec, loaded if loaded is not None else {})
    else:
        module = _named(place, spec)
    if not hasattr(module, name):
        callables = [
            key for key, value in vars(module).items() if callable(value) and not key.startswith("_")
        ]
        raise UserError(f"reward {spec!r}: {place} has no function {name!r}{_near(name, callables)}")
    function = getattr(module, name)
    if not callable(function):
        raise UserError(f"reward {spec!r}: {name} is a {type(function).__name__}, not a function")
    return function  # type: ignore[no-any-return]


def _from_file(path: Path, spec: str, loaded: dict[str, ModuleType]) -> ModuleType:
    path = path.resolve()
    if not path.is_file():
        files = [item.name for item in path.parent.glob("*.py")] if path.parent.is_dir() else []
        raise UserError(f"reward {spec!r}: no file {path}{_near(path.name, files)}")
    # A name of its own, so that two files called rewards.py do not become one module.
    name = f"kedge_reward_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if name in loaded:
        return loaded[name]
    source = importlib.util.spec_from_file_location(name, path)
    if source is None or source.loader is None:
        raise UserError(f"reward {spec!r}: {path} cannot be imported as Python")
    module = importlib.util.module_from_spec(source)
    sys.modules[name] = module
    sys.path.insert(0, str(path.parent))
    try:
        source.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise _import_failed(spec, error) from error
    finally:
        sys.path.remove(str(path.parent))
    loaded[name] = module
    return module


def _named(name: str, spec: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if name != missing and not name.startswith(f"{missing}."):
            raise _import_failed(spec, error) from error
        near = _near(missing.rpartition(".")[2], _siblings(missing))
        if Path(f"{name}.py").is_file():
            near = f"; did you mean {name}.py:{spec.rpartition(':')[2]}, the file?"
        raise UserError(f"reward {spec!r}: no module {missing!r}{near}") from error
    except Exception as error:
        raise _import_failed(spec, error) from error


def _siblings(name: str) -> list[str]:
    """Modules in the package that a module was looked for in."""
    parent = name.rpartition(".")[0]
    path = getattr(sys.modules.get(parent), "__path__", None) if parent else None
    return [item.name for item in pkgutil.iter_modules(path)] if path or not parent else []


def _import_failed(spec: str, error: Exception) -> UserError:
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    if isinstance(error, SyntaxError):
        where = f" ({error.filename}, line {error.lineno})"
    message = error.msg if isinstance(error, SyntaxError) else error
    return UserError(f"reward {spec!r}: importing it failed: {type(error).__name__}: {message}{where}")


def _near(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3)
    if near:
        return f"; did you mean {' or '.join(near)}?"
    return f"; there are {', '.join(sorted(known))}" if 0 < len(known) <= 12 else ""
