"""Hidden states on disk, where two models do not fit into memory together."""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import TracebackType

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from kedge.errors import RunError


class HiddenStore:
    """Keeps hidden states by name in a temporary folder, bit for bit; it goes with the store.

    The folder is where ``TMPDIR`` says; it takes, for each scored token, the bytes of both hidden states.

    >>> import torch
    >>> with HiddenStore() as store:
    ...     store.put("texts-0-policy", torch.tensor([[1.0, 2.0]]))
    ...     "texts-0-policy" in store, store.take("texts-0-policy")
    (True, tensor([[1., 2.]]))
    """

    def __enter__(self) -> HiddenStore:
        self._folder = tempfile.TemporaryDirectory(prefix="kedge-measure-")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._folder.cleanup()

    def __contains__(self, name: str) -> bool:
        return self._path(name).exists()

    def put(self, name: str, hidden: Tensor) -> None:
        """Write hidden states.

        Raises:
            RunError: the disk is full or cannot be written.
        """
        try:
            save_file({"hidden": hidden.contiguous()}, self._path(name))
        except (OSError, SafetensorError) as error:
            raise RunError(
                f"hidden states cannot be kept in {self._folder.name} ({error}): free some space there, or set "
                "TMPDIR to another folder"
            ) from error

    def take(self, name: str) -> Tensor:
        """Read hidden states, which are then gone."""
        hidden: Tensor = load_file(self._path(name))["hidden"].clone()
        self._path(name).unlink()
        return hidden

    def _path(self, name: str) -> Path:
        return Path(self._folder.name, f"{name}.safetensors")
