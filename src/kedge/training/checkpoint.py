"""Checkpoints: a folder each, whole or not there at all."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kedge.errors import RunError, UserError
from kedge.models import load_like, save_model
from kedge.runs import atomic_directory, load_state, save_state

FORMAT = 2
"""Of the state that is saved, counted up where an older one can no longer be gone on from."""
_NAME = re.compile(r"step-(\d{6,})(?:\.update-(\d{3,}))?")


@dataclass(frozen=True, order=True)
class Moment:
    """When a checkpoint was taken: after ``step`` steps, and ``update`` updates of the next (-1: not begun)."""

    step: int
    update: int = -1

    @property
    def name(self) -> str:
        """Folder name: ``step-000120``, or ``step-000120.update-002`` inside a step, with rollouts in hand."""
        return f"step-{self.step:06d}" + (f".update-{self.update:03d}" if self.update >= 0 else "")

    @classmethod
    def parse(cls, name: str) -> Moment | None:
        """Read a folder name; None if it is not a checkpoint's.

        >>> Moment.parse(Moment(120, 2).name)
        Moment(step=120, update=2)
        """
        match = _NAME.fullmatch(name)
        if match is None:
            return None
        return cls(int(match[1]), int(match[2]) if match[2] is not None else -1)


class Checkpoints:
    """The checkpoints of one stage: ``step-…`` folders with ``model/`` and the state of training beside it.

    ``best`` and, at the end, ``model`` in the run directory are links to what they name.
    """

    def __init__(self, directory: Path, keep: int) -> None:
        self.directory = directory
        self.keep = keep

    def moments(self) -> list[Moment]:
        """Complete checkpoints, oldest first."""
        if not self.directory.is_dir():
            return []
        found = (Moment.parse(entry.name) for entry in self.directory.iterdir() if entry.is_dir())
        return sorted(moment for moment in found if moment is not None)

    def path(self, moment: Moment) -> Path:
        """Folder of a checkpoint."""
        return self.directory / moment.name

    def save(
        self,
        moment: Moment,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        state: dict[str, Any],
    ) -> None:
        """Write a checkpoint, then remove what is no longer kept.

        One inside a step is written again: more of the step's responses may be in hand than before.
        """
        target = self.path(moment)
        if target.exists() and moment.update < 0:
            return
        with atomic_directory(target) as scratch:
            save_model(model, tokenizer, scratch / "model")
            save_state(scratch, {"format": FORMAT, **state})
        self._prune()

    def mark_best(self, moment: Moment) -> None:
        """Let ``best`` point at a checkpoint; the one it pointed at before is kept no longer than others."""
        _link(self.directory / "best", moment.name)
        self._prune()

    def best(self) -> Moment | None:
        """The checkpoint that ``best`` points at."""
        link = self.directory / "best"
        return Moment.parse(os.readlink(link)) if link.is_symlink() else None

    def load(self, moment: Moment) -> dict[str, Any]:
        """Read the state of training.

        Raises:
            UserError: another version of Kedge wrote it.
        """
        state: dict[str, Any] = load_state(self.path(moment))
        if state.get("format") != FORMAT:
            raise UserError(
                f"{self.path(moment)}: another version of Kedge wrote this checkpoint; go on with that one, or begin a "
                f"new run from its weights (model.path: {self.path(moment) / 'model'})"
            )
        return state

    def _prune(self) -> None:
        moments = self.moments()
        kept = {*moments[-self.keep :], self.best()}
        for moment in moments:
            if moment not in kept:
                shutil.rmtree(self.path(moment))


def link_final_model(stage_directory: Path, moment: Moment) -> None:
    """Let ``model`` in a stage's folder point at the model of its last checkpoint."""
    _link(stage_directory / "model", f"checkpoints/{moment.name}/model")


def _link(link: Path, target: str) -> None:
    """Point a link at a relative target, replacing an older link in one move."""
    scratch = link.with_name(link.name + ".new")
    scratch.unlink(missing_ok=True)
    scratch.symlink_to(target)
    os.replace(scratch, link)


def _other_model(directory: Path, name: str, saved: Tensor, here: Tensor | None) -> UserError:
    found = "is not in the model" if here is None else f"has shape {tuple(here.shape)} in the model"
    return UserError(
        f"{directory}: {name} was saved with shape {tuple(saved.shape)} and {found}: this is not the model that the "
        "run began with; give back the old settings of model, or start a new run under another name"
    )


def restore_weights(model: PreTrainedModel, directory: Path) -> None:
    """Load saved weights into a model in memory, bit for bit.

    Raises:
        UserError: they are another model's.
        RunError: some are missing.
    """
    state = model.state_dict()
    tied = set(model.state_dict(keep_vars=True)) - {name for name, _ in model.named_parameters()}
    missing = set(state)
    for name, saved in _saved(model, directory):
        if name not in state or state[name].shape != saved.shape:
            raise _other_model(directory, name, saved, state.get(name))
        with torch.no_grad():
            state[name].copy_(saved)
        missing.discard(name)
    pointers = {state[name].data_ptr() for name in set(state) - missing}
    lost = [name for name in missing if state[name].data_ptr() not in pointers and name not in tied]
    if lost or len(missing) == len(state):
        raise RunError(
            f"{directory}: weights are missing from the checkpoint: {', '.join(sorted(lost)) or 'all'}. It is "
            "damaged, or this is not the model that the run began with"
        )


def _saved(model: PreTrainedModel, directory: Path) -> Iterator[tuple[str, Tensor]]:
    """Give what a checkpoint holds, one tensor after the other, by the names that the model has for them.

    Of some architectures transformers writes the names, and the cut, of their first publication (``embed_out`` of
    GPT-NeoX, an expert at a time of Mixtral), so that other programs read them; then it reads them back itself.
    """
    opened = [safe_open(str(file), framework="pt") for file in sorted(directory.glob("*.safetensors"))]
    places = {name: file for file in opened for name in file.keys()}  # noqa: SIM118 (not a mapping)
    if places.keys() <= model.state_dict().keys():
        for name, file in places.items():
            yield name, file.get_tensor(name)
        return
    with torch.random.fork_rng(devices=[]):
        read = load_like(model, directory)
    yield from read.state_dict().items()
