"""The settings of a comparison."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from kedge.data import names_dataset
from kedge.errors import UserError
from kedge.models import DTYPES

Given: TypeAlias = str | Path | Sequence[str | Mapping[str, Any]]
"""What prompts or texts are read from: a file, a dataset's name, or rows."""
SAVED = "saved"
"""The dtype in which a checkpoint was saved."""


_OF_PROMPTS = {
    "responses": "--responses",
    "sample_from": "--from",
    "max_new_tokens": "--max-new-tokens",
    "prompt": "--prompt-format",
}
_OF_TEXTS = {"text": "--text-column", "window": "--window"}


def require_acting(given: Collection[str], *, prompts: Given | None, texts: Given | None) -> None:
    """Refuse settings that were given and would do nothing.

    Args:
        given: names of settings.
        prompts: what prompts are read from, if any.
        texts: what texts are read from, if any.

    Raises:
        UserError: naming the first of them, and what it acts on.

    >>> require_acting({"responses", "temperature"}, prompts=["1+2="], texts=None)
    """
    if "split" in given and not any(
        isinstance(each, str | Path) and names_dataset(each) for each in (prompts, texts)
    ):
        raise UserError("split (--split) acts on datasets alone, and there are none: leave it out")
    for data, source, names in (("prompts", prompts, _OF_PROMPTS), ("texts", texts, _OF_TEXTS)):
        idle = [name for name in names if name in given and source is None]
        if idle:
            raise UserError(
                f"{idle[0]} ({names[idle[0]]}) acts on {data} alone, and there are none: give {data}, or leave it out"
            )


@dataclass(frozen=True)
class MeasureConfig:
    """How two models are compared; every setting is recorded in ``measure.json``.

    Attributes:
        responses: G, responses sampled for each prompt.
        sample_from: whose responses: the policy's (reverse KL), the reference's (forward KL), both.
        max_new_tokens: length limit of a response, its end token included.
        temperature: of sampling and of both distributions, of texts, too: all logits are divided by it.
        split: of datasets that prompts or texts are read from; None where there is only one. Files have none.
        count: the first so many prompts and texts; None: all.
        prompt: format of a prompt's columns, as in recipes.
        text: the column of a text; rows without it are read as messages, or prompt and completion.
        window: W, tokens of a text that go through a model at once; longer texts are read in windows that overlap by
            half. None: 2,048, or the models' context where that is less.
        dtype: of weights and hidden states: float32, bfloat16, float64, or ``saved``: each as its file has it,
            which is also said of models in memory. Logits are never below float32.
        device: a PyTorch device; ``auto`` is CUDA where there is one.
        seed: of sampling and of the bootstrap.
        batch: sequences that go through a model at once, at most.
        low_memory: one model in memory at a time, hidden states on disk; the same figures to the last bit.
        backend: of the head; None chooses by the work ahead.
        confidence: of the intervals.
        resamples: of the bootstrap.
        width: the half-width of the interval that is wanted, as a share of the value; for ``needed``.
        most: how many of the tokens that moved most are listed, in each list.

    >>> MeasureConfig(responses=2).sample_from
    'both'
    """

    responses: int = 4
    sample_from: Literal["policy", "reference", "both"] = "both"
    max_new_tokens: int = 128
    temperature: float = 1.0
    split: str | None = None
    count: int | None = None
    prompt: str = "{prompt}"
    text: str = "text"
    window: int | None = None
    dtype: str = "float32"
    device: str = "auto"
    seed: int = 0
    batch: int = 16
    low_memory: bool = False
    backend: str | None = None
    confidence: float = 0.95
    resamples: int = 2000
    width: float = 0.1
    most: int = 20

    def __post_init__(self) -> None:
        for name in ("responses", "max_new_tokens", "batch"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} = {getattr(self, name)} must be at least 1")
        if self.count is not None and self.count < 1:
            raise UserError(f"count = {self.count} must be at least 1, or left out")
        if self.window is not None and self.window < 2:
            raise UserError(
                f"window = {self.window} must be at least 2: a token is scored behind one that is read"
            )
        if self.most < 0:
            raise UserError(f"most = {self.most} must not be negative")
        if not 0 <= self.seed < 2**64:
            raise UserError(f"seed = {self.seed} must be from 0 to 2**64 - 1")
        if not 0 < self.temperature < float("inf"):
            raise UserError(
                f"temperature = {self.temperature} must be above 0: a KL along greedy responses estimates nothing"
            )
        if not 0 < self.confidence < 1:
            raise UserError(f"confidence = {self.confidence} must be between 0 and 1, e.g. 0.95")
        least = round(2 / (1 - self.confidence))
        if self.resamples < least:
            raise UserError(
                f"resamples = {self.resamples} must be at least {least}, so that one lies beyond either bound of an "
                f"interval of confidence {self.confidence:g}"
            )
        if not self.width > 0:
            raise UserError(f"width = {self.width} must be above 0: a share of the value, e.g. 0.1")
        if self.dtype not in (*DTYPES, SAVED):
            raise UserError(f"dtype = {self.dtype!r} is none of {', '.join((*DTYPES, SAVED))}")
        if self.sample_from not in ("policy", "reference", "both"):
            raise UserError(f"sample_from = {self.sample_from!r} is none of policy, reference, both")
