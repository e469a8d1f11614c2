"""Which of the head's backends a stage works with: a matter of speed, settled before its first step."""

from __future__ import annotations

import torch

from kedge.errors import UserError
from kedge.head.backend import compiler_found, fastest_backend
from kedge.training.config import ComputeConfig, PolicyStage, SftStage
from kedge.training.examples import Examples


def head_backend(compute: ComputeConfig, logits: float | int, device: torch.device) -> str:
    """Choose by what the recipe says, on a CPU else by the work ahead: the same recipe chooses the same again.

    Args:
        compute: the stage's section.
        logits: about how many logits the stage will make.
        device: where the model is.

    Raises:
        UserError: ``compile_head: true`` on a CPU without a C++ compiler.
    """
    if compute.compile_head is None:
        return fastest_backend(logits, device)
    if not compute.compile_head:
        return "auto"  # a GPU's kernels need no compiling
    if device.type == "cpu" and not compiler_found():
        raise UserError(
            "compute.compile_head: there is no working C++ compiler on this machine; install one (g++), or set it "
            "to false"
        )
    return "compiled"


def sft_logits(stage: SftStage, examples: Examples, tokens: int) -> float:
    """Logits that supervised fine-tuning will make over a vocabulary of ``tokens``."""
    targets = sum(int(each.sum()) for each in examples.targets) / len(examples)
    return stage.steps * stage.batch_size * targets * tokens


def policy_logits(stage: PolicyStage, tokens: int) -> int:
    """Logits that policy optimisation will make at most, in its updates alone."""
    return stage.steps * stage.responses_per_step * stage.epochs * stage.rollout.max_new_tokens * tokens
