"""Nested state (tensors, numbers, strings) as safetensors beside JSON, bit for bit."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from kedge.errors import RunError
from kedge.runs.atomic import write_failure, write_file

TENSORS, TREE = "state.safetensors", "state.json"


def save_state(directory: str | os.PathLike[str], tree: Any) -> None:
    """Save a tree of dictionaries, lists, tuples, tensors, numbers, strings, booleans and None.

    Tensors come back bit for bit, of every dtype that safetensors knows and of any shape, on the CPU; views
    are saved as tensors of their own, and a tensor that occurs twice is saved once. Numbers come back
    exactly, NaN and the infinities included; dictionaries keep their order and their keys' types.

    Args:
        directory: The folder for ``state.safetensors`` and ``state.json``; made if missing. To have both or
            neither after a kill, save inside ``atomic_directory``.
        tree: The state.

    Raises:
        TypeError: Something else is in the tree; the message says where.
        RunError: The disk is full or the folder cannot be written.

    >>> import tempfile
    >>> folder = tempfile.mkdtemp()
    >>> save_state(folder, {"beta": 0.1, "moments": {0: torch.ones(2)}, "best": float("-inf")})
    >>> load_state(folder)
    {'beta': 0.1, 'moments': {0: tensor([1., 1.])}, 'best': -inf}
    """
    folder = Path(directory)
    names: dict[int, str] = {}
    tensors: dict[str, torch.Tensor] = {}
    plain = _encode(tree, "state", names, tensors)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / TENSORS)
    except (OSError, SafetensorError) as error:
        raise write_failure(error, folder / TENSORS) from error
    write_file(folder / TREE, json.dumps(plain, allow_nan=False).encode())


def load_state(directory: str | os.PathLike[str]) -> Any:
    """Load what ``save_state`` saved, with tensors on the CPU.

    Raises:
        RunError: A file is missing or damaged.
    """
    folder = Path(directory)
    try:
        plain = json.loads((folder / TREE).read_bytes())
        tensors = load_file(folder / TENSORS)
        return _decode(plain, tensors)
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise RunError(
            f"{folder}: cannot be read ({error}); remove it, resume=true then continues from the one before."
        ) from error


def _encode(value: Any, where: str, names: dict[int, str], tensors: dict[str, torch.Tensor]) -> Any:
    """Turn a tree into JSON in which every object has one key, the kind of what it stands for."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": repr(value)}
    if isinstance(value, torch.Tensor):
        if id(value) not in names:
            names[id(value)] = str(len(names))
            tensors[names[id(value)]] = _own_storage(value)
        return {"tensor": names[id(value)]}
    if isinstance(value, Mapping):
        keys = [_encode(key, f"a key of {where}", names, tensors) for key in value]
        entries = [_encode(entry, f"{where}[{key!r}]", names, tensors) for key, entry in value.items()]
        return {"dict": list(zip(keys, entries, strict=True))}
    if isinstance(value, list | tuple):
        entries = [_encode(entry, f"{where}[{i}]", names, tensors) for i, entry in enumerate(value)]
        return entries if isinstance(value, list) else {"tuple": entries}
    kind = type(value).__name__
    raise TypeError(
        f"{where}: cannot save {kind!r}; only tensors, numbers, strings, None in lists and dictionaries."
    )


def _own_storage(tensor: torch.Tensor) -> torch.Tensor:
    """Detach, on the CPU, with a storage that no other tensor shares."""
    plain = tensor.detach()
    if plain.device.type == "cpu":
        whole = plain.untyped_storage().nbytes() == plain.numel() * plain.element_size()
        if whole and plain.is_contiguous():
            return plain
        return plain.clone(memory_format=torch.contiguous_format)
    return plain.cpu().contiguous()


def _decode(value: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(entry, tensors) for entry in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "float":
        return float(content)
    if kind == "tuple":
        return tuple(_decode(entry, tensors) for entry in content)
    return {_decode(key, tensors): _decode(entry, tensors) for key, entry in content}
