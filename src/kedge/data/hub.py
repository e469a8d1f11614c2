"""Reading rows through the library `datasets`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kedge.data.rows import Rows
from kedge.errors import RunError, UserError


def load_dataset_rows(name: str, split: str | None, local: bool) -> Rows:
    """Load one split of a dataset.

    Args:
        name: ``name`` or ``name:configuration``; a folder when ``local``.
        split: which split; may be left out if there is only one.
        local: ``name`` is a folder, one that ``save_to_disk`` wrote or one of data files.

    Returns:
        Its rows.

    Raises:
        UserError: ``datasets`` is not installed, or there is no such dataset, configuration or split.
        RunError: it could not be fetched.
    """
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"{name}: no such file, and loading datasets by name needs the library datasets: "
            "pip install 'kedge[datasets]'"
        ) from error
    try:
        loaded = _load(datasets, name, local)
    except ConnectionError as error:
        raise RunError(f"{name}: the dataset could not be fetched ({_first_line(error)})") from error
    except (FileNotFoundError, ValueError) as error:
        raise UserError(
            f"{name}: neither a file nor a dataset that can be loaded ({_first_line(error)}); "
            "give a .jsonl, .json or .parquet file, a dataset's name, or name:configuration"
        ) from error
    source, table = _choose(loaded, name, split)
    return Rows(table, source)


def _load(datasets: Any, name: str, local: bool) -> Any:
    if local and any(Path(name, mark).is_file() for mark in ("dataset_dict.json", "state.json")):
        return datasets.load_from_disk(name)
    repository, _, configuration = (name, "", "") if local else name.partition(":")
    return datasets.load_dataset(repository, configuration or None)


def _choose(loaded: Any, name: str, split: str | None) -> tuple[str, Any]:
    """Pick the split; a single dataset saved by itself has none."""
    if not isinstance(loaded, dict):
        if split is not None:
            raise UserError(f"{name}: split {split!r} does nothing here, it holds a single one; leave it out")
        return name, loaded
    if split is None and len(loaded) > 1:
        raise UserError(f"{name}: which split? Set split to one of {', '.join(loaded)}")
    chosen = next(iter(loaded)) if split is None else split
    if chosen not in loaded:
        raise UserError(f"{name}: no split {chosen!r}; there are {', '.join(loaded)}")
    return f"{name} [{chosen}]", loaded[chosen]


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
