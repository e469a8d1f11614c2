"""PEFT adapters: a folder of low-rank changes, merged into the model that they change."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import torch
from transformers import PreTrainedModel

from kedge.errors import UserError

CONFIG = "adapter_config.json"


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter and no model of its own.

    >>> is_adapter(Path("no-such-folder"))
    False
    """
    return (folder / CONFIG).is_file() and not (folder / "config.json").is_file()


def base_of(folder: Path) -> str:
    """Read which model an adapter belongs to.

    Raises:
        UserError: its configuration is damaged or names none.
    """
    try:
        base = json.loads((folder / CONFIG).read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"adapter {str(folder)!r}: its {CONFIG} cannot be read: {error}") from error
    if not isinstance(base, str) or not base:
        raise UserError(
            f"adapter {str(folder)!r}: its {CONFIG} does not name the model that it changes: set "
            "base_model_name_or_path"
        )
    return base


def require_peft(folder: Path) -> None:
    """Refuse an adapter where the library that reads it is missing.

    Raises:
        UserError: naming the extra.
    """
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"adapter {str(folder)!r}: reading it needs peft, which is not installed: pip install 'kedge[peft]'"
        ) from error


def merge_adapter(model: PreTrainedModel, folder: Path, dtype: torch.dtype | None) -> PreTrainedModel:
    """Add an adapter's changes to the weights of its model, in the model's dtype.

    Args:
        model: the base, changed in place.
        folder: the adapter's, safetensors only.
        dtype: of the merged weights; None leaves that of the base.

    Raises:
        UserError: there are no safetensors in the folder.
    """
    import peft

    if not (folder / "adapter_model.safetensors").is_file():
        raise UserError(
            f"adapter {str(folder)!r}: {CONFIG} without adapter_model.safetensors: save it with safe_serialization"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft's use of names that transformers renames
        merged: PreTrainedModel = peft.PeftModel.from_pretrained(model, str(folder)).merge_and_unload()
    return merged if dtype is None else merged.to(dtype)
