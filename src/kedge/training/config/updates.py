"""The sections on updates: optimizer, checkpoints, arithmetic."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from kedge.training.config.section import NonNegative, Positive, Rate, Section


class OptimizerConfig(Section):
    """AdamW with a schedule."""

    learning_rate: Rate = 1e-5
    """Peak learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """After the warm-up: constant, or down to `final_fraction` of the peak, which the step after the last would
    have."""
    warmup_steps: NonNegative = 0
    """Steps of linear warm-up."""
    final_fraction: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Where linear and cosine schedules end, as a fraction of the peak."""
    betas: Annotated[list[Annotated[float, Field(ge=0, lt=1)]], Field(min_length=2, max_length=2)] = [
        0.9,
        0.95,
    ]
    """Decay of the two moments."""
    eps: Rate = 1e-8
    """Added to the root of the second moment."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled decay, on matrices only."""
    max_gradient_norm: Rate | None = 1.0
    """Gradients are clipped to this global norm; null: not clipped."""

    @model_validator(mode="after")
    def _acts(self) -> OptimizerConfig:
        if self.schedule == "constant" and self.final_fraction != 0.0:
            raise ValueError("final_fraction does nothing with a constant schedule")
        return self


class CheckpointConfig(Section):
    """What a killed run resumes from."""

    every: Positive = 50
    """Steps between checkpoints; there is always one at the end."""
    keep: Positive = 2
    """How many of the latest stay; the best by evaluation stays beside them."""


class ComputeConfig(Section):
    """How the same numbers are computed; changes nothing but speed and memory (and rounding)."""

    micro_batch: Positive = 64
    """Sequences in one forward and backward pass; gradients add up over the passes of an update."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of the transformer blocks; weights, logits, losses and optimizer stay as they are."""
    layout: Literal["padded", "packed"] = "padded"
    """One padded rectangle a pass, or all sequences end to end in one row. In padded passes of policy optimisation a
    prompt is read once for all of its responses in the pass, where that spares a tenth of the tokens and the model
    goes on from keys and values as from tokens (not with activation checkpointing)."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    compile_head: bool | None = None
    """Fuse the head's element-wise work by torch's compiler (on a CPU it needs a C++ compiler), which takes some ten
    seconds at the start; when left out, on a CPU where the stage makes more than ten billion logits. GPUs have kernels
    of their own, which true replaces and false keeps."""
    head_chunk_rows: Positive | None = None
    """Rows of logits made at a time; chosen by shape when left out."""
