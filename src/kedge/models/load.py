"""Models and tokenizers from a folder or from the Hugging Face hub."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from kedge.errors import KedgeError, RunError, UserError
from kedge.models._quiet import quiet
from kedge.models.adapter import base_of, is_adapter, merge_adapter, require_peft

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_COMPLETE: Any = {
    "use_safetensors": True,
    "ignore_mismatched_sizes": True,  # reported by _complete
    "output_loading_info": True,
}


def load_model(
    source: str | Path,
    *,
    dtype: torch.dtype | None = torch.float32,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load a causal language model, from safetensors only, in evaluation mode, on the CPU.

    Args:
        source: a folder that ``save_model`` or ``save_pretrained`` wrote, the folder of a PEFT adapter, which is
            merged into its base, or a name on the hub (``owner/name``).
        dtype: of the weights in memory; None leaves that of the files.
        revision: a branch, tag or commit on the hub.
        trust_remote_code: let the model's own Python code run.

    Raises:
        UserError: no such folder or name; no configuration or no weights there; an unknown architecture;
            weights missing from the files.
        RunError: damaged files; the hub cannot be reached.

    >>> from tempfile import TemporaryDirectory
    >>> from kedge.models import build_model, fingerprint, save_model
    >>> model = build_model(32, hidden_size=8, layers=1, heads=2, context=16, seed=0)
    >>> with TemporaryDirectory() as folder:
    ...     save_model(model, None, folder)
    ...     loaded = load_model(folder)
    >>> fingerprint(loaded) == fingerprint(model)
    True
    """
    where = _place(source, "model")
    if isinstance(where, Path) and is_adapter(where):
        require_peft(where)
        base = load_model(base_of(where), dtype=dtype, trust_remote_code=trust_remote_code)
        with _explained(source, "adapter"), quiet():
            return merge_adapter(base, where, dtype).eval()
    if isinstance(where, Path):
        _require_weights(where)
    with _explained(source, "model"), quiet():
        loaded = AutoModelForCausalLM.from_pretrained(
            where,
            dtype="auto" if dtype is None else dtype,
            revision=revision or "main",
            trust_remote_code=trust_remote_code,
            **_COMPLETE,
        )
    return _complete(loaded, f"model {str(source)!r}")


def load_reward_model(source: str | Path, *, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Load a sequence classifier with one label, from safetensors only, in evaluation mode, on the CPU.

    Whether it scores as Kedge does, :func:`kedge.models.verify_scores` finds out.

    Args:
        source: a folder that a reward stage or ``save_pretrained`` wrote, or a name on the hub.
        dtype: of the weights in memory.

    Raises:
        UserError: as :func:`load_model`; a model of another kind; several labels.
        RunError: damaged files; the hub cannot be reached.
    """
    name = f"reward model {str(source)!r}"
    where = _place(source, "reward model")
    if isinstance(where, Path):
        _require_weights(where)
    with _explained(source, "reward model"), quiet():
        config = AutoConfig.from_pretrained(where)
        kinds = [kind for kind in config.architectures or () if "ForSequenceClassification" not in kind]
        if kinds:
            raise UserError(
                f"{name} is a {kinds[0]}, not a sequence classifier, so it gives no scores: train a reward model from "
                "it with a stage of method: reward"
            )
        if config.num_labels != 1:
            raise UserError(
                f"{name} has {config.num_labels} labels, and a reward is one number: give a sequence classifier with "
                "one label (num_labels=1)"
            )
        loaded = AutoModelForSequenceClassification.from_pretrained(where, dtype=dtype, **_COMPLETE)
    return _complete(loaded, name)


def load_like(model: PreTrainedModel, directory: Path) -> PreTrainedModel:
    """Load what :func:`kedge.models.save_model` wrote, as a model of the class and dtype of another.

    Raises:
        UserError: as :func:`load_model`.
        RunError: damaged files.
    """
    with _explained(directory, "model"), quiet():
        loaded = type(model).from_pretrained(directory, dtype=model.dtype, **_COMPLETE)
    return _complete(loaded, f"model {str(directory)!r}")


def _complete(loaded: tuple[PreTrainedModel, Mapping[str, Any]], name: str) -> PreTrainedModel:
    """Refuse a model some of whose weights were not in its files."""
    model, found = loaded
    absent = sorted(found["missing_keys"]) + sorted(str(key) for key in found["mismatched_keys"])
    if absent:
        raise UserError(
            f"{name}: {len(absent)} weights of {type(model).__name__} are not in its files "
            f"or have another shape (first: {absent[0]}), so they would be random: "
            "check that config.json belongs to them"
        )
    return model.eval()


def is_reward_model(source: str | Path) -> bool:
    """Tell from a model's configuration whether it scores sequences instead of predicting tokens.

    Raises:
        UserError: there is no such folder or name, or no model in it.
        RunError: the hub cannot be reached.
    """
    where = _place(source, "model")
    if isinstance(where, Path):
        _require_weights(where)
    with _explained(source, "model"), quiet():
        kinds = AutoConfig.from_pretrained(where).architectures or ()
    return any("ForSequenceClassification" in kind for kind in kinds)


def load_tokenizer(
    source: str | Path, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model; arguments and errors as in :func:`load_model`."""
    where = _place(source, "tokenizer")
    if isinstance(where, Path) and not has_tokenizer(where):
        raise UserError(f"tokenizer {str(source)!r}: the folder has no tokenizer files (tokenizer.json)")
    try:
        with _explained(source, "tokenizer"), quiet():
            return AutoTokenizer.from_pretrained(
                where, revision=revision or "main", trust_remote_code=trust_remote_code
            )
    except UserError:
        if isinstance(where, Path):
            _require_json(where)
        raise


def has_tokenizer(source: str | Path) -> bool:
    """Tell whether a source is a folder with tokenizer files, readable or not."""
    folder = Path(source).expanduser()
    return folder.is_dir() and any(folder.glob("*token*"))


def _require_json(folder: Path) -> None:
    """Name the file of a tokenizer that is damaged, which the libraries do not."""
    for file in sorted(folder.glob("*token*.json")):
        try:
            json.loads(file.read_bytes())
        except ValueError as error:
            raise RunError(f"{file}: damaged ({error}): copy or download it again") from error


def _place(source: str | Path, what: str) -> Path | str:
    """Tell a folder from a name on the hub."""
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise UserError(f"{what} {str(source)!r} is a file: give the folder that holds config.json")
    if isinstance(source, Path) or not _HUB_NAME.fullmatch(source) or source.startswith("."):
        raise UserError(
            f"{what} {str(source)!r}: there is no such folder, and it is no name on the hub (owner/name); "
            f"relative paths start from {Path.cwd()}"
        )
    return source


def _require_weights(folder: Path) -> None:
    """Refuse a folder that cannot hold a model before transformers looks at it."""
    if not (folder / "config.json").is_file():
        raise UserError(f"model {str(folder)!r}: the folder has no config.json, so it holds no model")
    if not any(folder.glob("*.safetensors")):
        pickled = any(folder.glob("*.bin")) or any(folder.glob("*.pt"))
        remedy = (
            "convert its pickled weights with save_pretrained" if pickled else "copy model.safetensors there"
        )
        raise UserError(f"model {str(folder)!r}: config.json without weights (*.safetensors): {remedy}")


@contextmanager
def _explained(source: str | Path, what: str) -> Iterator[None]:
    """Turn what the loading libraries raise into one clear error."""
    name = f"{what} {str(source)!r}"
    try:
        yield
    except KedgeError:
        raise
    except SafetensorError as error:
        raise RunError(
            f"{name}: its safetensors file is damaged ({error}): copy or download it again"
        ) from error
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError) as error:
        causes = list(_chain(error))
        if any(isinstance(cause, GatedRepoError) for cause in causes):
            raise UserError(
                f"{name} is gated: accept its terms on the hub and log in (hf auth login)"
            ) from error
        if any(isinstance(cause, RepositoryNotFoundError | RevisionNotFoundError) for cause in causes):
            raise UserError(
                f"{name}: there is no such folder and no such name or revision on the hub: "
                "check the spelling; private names need a login (hf auth login)"
            ) from error
        first_line = str(error).strip().split("\n")[0]
        if (
            isinstance(where := source, str)
            and not Path(where).expanduser().exists()
            and isinstance(error, OSError)
        ):
            raise RunError(
                f"{name}: there is no such folder, and the hub could not be read ({first_line}): check the "
                "network (and HF_HUB_OFFLINE), or give the path of a folder"
            ) from error
        raise UserError(f"{name} cannot be loaded: {first_line}") from error


def _chain(error: BaseException) -> Iterator[BaseException]:
    """List an exception and everything it was raised from."""
    current: BaseException | None = error
    while current is not None:
        yield current
        current = current.__cause__ or current.__context__
