"""The two models of a comparison: together in memory, or one at a time."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any, TypeAlias, get_args

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kedge.errors import RunError, UserError
from kedge.head import Head
from kedge.measure.config import SAVED
from kedge.measure.questions import Side
from kedge.models import (
    DTYPES,
    context_length,
    device_named,
    fingerprint,
    has_tokenizer,
    head_of,
    load_model,
    load_tokenizer,
    special_tokens,
    usable_vocabulary,
    verify_head,
    vocabulary_difference,
)

Source: TypeAlias = str | Path | PreTrainedModel
SIDES: tuple[Side, ...] = get_args(Side)


class Models:
    """Both models, their heads, their one tokenizer, and what is known of them.

    Args:
        policy: a folder, a name on the hub, a folder with a PEFT adapter, or a model in memory.
        reference: the same.
        tokenizer: of both; None reads it from the reference, or from the policy where that has none.
        dtype: of weights that are loaded, a key of ``DTYPES`` or ``saved``. A model in memory stays as it is.
        device: of weights that are loaded, and where models in memory must be.
        low_memory: keep one model at a time; the heads stay.
        trust_remote_code: let the models' own Python code run.

    Raises:
        UserError: a model that cannot be loaded or that Kedge does not understand, tokenizers that differ, or
            models in memory with ``low_memory``.
        RunError: damaged files; the hub cannot be reached.
    """

    def __init__(
        self,
        policy: Source,
        reference: Source,
        tokenizer: PreTrainedTokenizerBase | None,
        *,
        dtype: str,
        device: str,
        low_memory: bool,
        trust_remote_code: bool = False,
    ) -> None:
        self._sources: dict[Side, Source] = {"policy": policy, "reference": reference}
        self._dtype, self._low_memory, self._trust = dtype, low_memory, trust_remote_code
        self._loaded: dict[Side, PreTrainedModel] = {}
        self.heads: dict[Side, Head] = {}
        self.facts: dict[Side, dict[str, Any]] = {}
        self.notes: list[str] = []
        self.device = torch.empty(0, device=device_named(device)).device  # with its number, where it has one
        in_memory = [side for side in SIDES if isinstance(self._sources[side], PreTrainedModel)]
        if low_memory and in_memory:
            raise UserError(
                f"low_memory does nothing for a model that is in memory already ({in_memory[0]}): leave it out, or "
                "give the paths of both"
            )
        self.tokenizer = self._one_tokenizer(tokenizer)
        self.vocabulary = max(self.tokenizer.get_vocab().values()) + 1
        for side in SIDES:
            self._learn(side, self.take(side))

    @property
    def context(self) -> int | None:
        """Tokens that a sequence can have in both models; None if neither says."""
        known = [facts["context"] for facts in self.facts.values() if facts["context"] is not None]
        return min(known) if known else None

    def take(self, side: Side) -> PreTrainedModel:
        """Give a model, loaded if it is not; with ``low_memory`` the other one goes first."""
        if side not in self._loaded:
            if self._low_memory:
                self._loaded.clear()
                gc.collect()
            self._loaded[side] = self._load(side)
        return self._loaded[side]

    def _load(self, side: Side) -> PreTrainedModel:
        source = self._sources[side]
        if isinstance(source, PreTrainedModel):
            if source.device != self.device:
                raise UserError(
                    f"the {side} is on {source.device}, the comparison on {self.device}: move it there, or "
                    f"set device={str(source.device)!r}"
                )
            return source
        dtype: torch.dtype | None = None if self._dtype == SAVED else DTYPES[self._dtype]
        try:
            model = load_model(source, dtype=dtype, trust_remote_code=self._trust)
        except (UserError, RunError) as error:
            raise type(error)(f"{side}: {error}") from error
        return model.requires_grad_(False).to(self.device)

    def _learn(self, side: Side, model: PreTrainedModel) -> None:
        source = self._sources[side]
        name = model.config.name_or_path or type(model).__name__
        try:
            _, ends = special_tokens(model, self.tokenizer)
            usable_vocabulary(model, self.tokenizer)
            verify_head(model)
        except UserError as error:
            raise UserError(f"{side}: {error}") from error
        head = head_of(model, self.vocabulary).detach()
        self.heads[side] = head.snapshot() if self._low_memory else head
        self.facts[side] = {
            "source": str(name if isinstance(source, PreTrainedModel) else source),
            "architecture": type(model).__name__,
            "parameters": model.num_parameters(),
            "dtype": str(model.dtype).removeprefix("torch."),
            "vocabulary_rows": int(head.weight.shape[0]),
            "context": context_length(model),
            "end_tokens": [end for end in ends if end < self.vocabulary],
            "fingerprint": fingerprint(model),
        }

    def _one_tokenizer(self, given: PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase:
        """Read both tokenizers and refuse two that differ; one may be missing, which a note says."""
        if given is not None:
            return given
        found: dict[Side, PreTrainedTokenizerBase] = {}
        missing: dict[Side, UserError] = {}
        for side in ("reference", "policy"):
            source = self._sources[side]
            if isinstance(source, PreTrainedModel):
                continue
            try:
                found[side] = load_tokenizer(source, trust_remote_code=self._trust)
            except UserError as error:
                if has_tokenizer(source):
                    raise UserError(f"{side}: {error}") from error
                missing[side] = error
            except RunError as error:
                raise RunError(f"{side}: {error}") from error
        if not found:
            reasons = "".join(f" ({reason})" for reason in list(missing.values())[:1])
            raise UserError(
                f"neither model has a tokenizer{reasons}: copy its files into one of the folders, or give tokenizer="
            )
        for side, reason in missing.items():
            self.notes.append(
                f"the {side} has no tokenizer of its own ({reason}): the {next(iter(found))}'s is used for both"
            )
        if len(found) == 2:
            difference = vocabulary_difference(found["reference"], found["policy"])
            if difference is not None:
                raise UserError(
                    f"the tokenizers differ: the policy has {difference} as the reference has; ids that mean "
                    "other tokens make a KL that means nothing: compare models of one tokenizer"
                )
        return next(iter(found.values()))
