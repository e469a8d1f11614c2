"""A model and its tokenizer written so that transformers loads them."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kedge.errors import RunError
from kedge.models._quiet import quiet


def save_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, directory: str | Path
) -> None:
    """Write weights (safetensors), configuration and tokenizer to a folder.

    The folder loads with ``AutoModelForCausalLM.from_pretrained`` and :func:`kedge.models.load_model` (a reward
    model: ``AutoModelForSequenceClassification`` and :func:`kedge.models.load_reward_model`). The write itself is
    not atomic: do it inside a folder that is renamed when complete (``kedge.runs.atomic_directory``).

    Raises:
        RunError: the folder cannot be written, or there is no space left.
    """
    try:
        Path(directory).mkdir(parents=True, exist_ok=True)  # transformers goes on silently if it is a file
        with quiet():
            model.save_pretrained(directory)
            if tokenizer is not None:
                tokenizer.save_pretrained(directory)
    except (OSError, SafetensorError) as error:
        raise RunError(
            f"the model could not be saved to {str(directory)!r} ({error}): "
            "free some space or choose another folder"
        ) from error
