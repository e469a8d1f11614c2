"""What a run starts from: data, tokenizer, model, reference."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import model_validator

from kedge.training.config.section import Positive, Rate, Section


class PromptsConfig(Section):
    """Prompts: an embedded task, a file (JSONL, JSON, Parquet) or a name that `datasets` loads."""

    task: str | None = None
    """`sums` or `prose`."""
    path: str | None = None
    """A file, or a dataset's name."""
    split: str | None = None
    """`train` or `heldout` of a task (default `train`); the split's name of a dataset."""
    count: Positive | None = None
    """Rows made by a task (default 4096) or taken from a file, from its start (default all)."""
    prompt: str = "{prompt}"
    """How a row becomes a prompt; columns in braces. Exactly one column in braces may hold chat messages."""

    @model_validator(mode="before")
    @classmethod
    def _no_completion(cls, given: Any) -> Any:
        if isinstance(given, dict) and "completion" in given and "completion" not in cls.model_fields:
            raise ValueError("completion does nothing here: the policy writes the responses; leave it out")
        return given

    @model_validator(mode="after")
    def _one_source(self) -> PromptsConfig:
        if (self.task is None) == (self.path is None):
            raise ValueError("give exactly one of task, path")
        return self


class ExamplesConfig(PromptsConfig):
    """Prompts with their completions, from the same sources."""

    completion: str = "{completion}"
    """How a row becomes a completion."""


class BpeConfig(Section):
    """A byte-level BPE tokenizer trained on the spot."""

    data: ExamplesConfig
    """Rows whose prompts and completions it is trained on."""
    vocab_size: Positive = 2048
    """Entries of the vocabulary."""


class TokenizerConfig(Section):
    """Where the tokenizer comes from: exactly one of the three."""

    path: str | None = None
    """A Hugging Face name or folder."""
    task: str | None = None
    """The tokenizer of an embedded task, `sums` or `prose`."""
    bpe: BpeConfig | None = None
    """Train one."""

    @model_validator(mode="after")
    def _exactly_one(self) -> TokenizerConfig:
        if sum(x is not None for x in (self.path, self.task, self.bpe)) != 1:
            raise ValueError("give exactly one of path, task, bpe")
        return self


class BuildConfig(Section):
    """A model made on the spot with random weights (drawn from the recipe's seed)."""

    architecture: Literal["llama", "qwen3", "gemma2", "gpt2", "mistral"] = "llama"
    """The Hugging Face architecture."""
    hidden_size: Positive = 128
    """Width H."""
    layers: Positive = 4
    """Transformer blocks."""
    heads: Positive = 4
    """Attention heads; hidden_size is an even multiple of it."""
    intermediate_size: Positive | None = None
    """Width of the feed-forward block; 3 × hidden_size when left out."""
    context: Positive = 128
    """Longest sequence, in tokens."""
    initializer_range: Rate = 0.02
    """Standard deviation of the random weights; small models learn faster from 0.06."""


class ModelConfig(Section):
    """The policy at the start of the first stage: `path`, or `build` with `tokenizer`, or an object in memory."""

    path: str | None = None
    """A Hugging Face causal language model: name or folder."""
    build: BuildConfig | None = None
    """Make one."""
    tokenizer: TokenizerConfig | None = None
    """Needed with `build`; with `path` the model's own is used when left out."""
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """Type of the weights. Training wants float32 weights; see `precision` for bfloat16 arithmetic."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""

    @model_validator(mode="after")
    def _one_source(self) -> ModelConfig:
        if self.path is not None and self.build is not None:
            raise ValueError("path and build exclude each other")
        if self.build is not None and self.tokenizer is None:
            raise ValueError("a model that is built needs a tokenizer: add tokenizer: {task: …} or {bpe: …}")
        if self.build is not None and (self.revision is not None or self.trust_remote_code):
            raise ValueError("revision and trust_remote_code belong to path")
        return self


class ReferenceConfig(Section):
    """What the policy is anchored to; a frozen copy of the policy at the stage's start when left out."""

    path: str
    """A Hugging Face model with the same vocabulary."""
