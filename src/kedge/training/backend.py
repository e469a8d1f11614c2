"""Which of the head's backends a stage works with: a matter of speed, settled before its first step."""

from __future__ import annotations

import torch

from kedge.errors import UserError
from kedge.training.config import ComputeConfig, PolicyStage, SftStage
from kedge.training.examples import Examples

COMPILING_PAYS = 10**10
"""Logits in a stage from which fusing saves minutes; compiling takes some ten seconds."""


def head_backend(compute: ComputeConfig, logits: float | int, device: torch.device) -> str:
    """Choose by what the recipe says, on a CPU else by the work ahead: the same recipe chooses the same again.

    Args:
        compute: the stage's section.
        logits: about how many logits the stage will make.
        device: where the model is.

    Raises:
        UserError: ``compile_head: true`` on a CPU without a C++ compiler.
    """
    if device.type != "cpu" and compute.compile_head is None:
        return "auto"
    wanted = compute.compile_head if compute.compile_head is not None else logits >= COMPILING_PAYS
    if not wanted:
        return "chunked"
    if device.type == "cpu" and not _compiler_found():
        if compute.compile_head:
            raise UserError(
                "compute.compile_head: there is no working C++ compiler on this machine; install one (g++), or set it "
                "to false"
            )
        return "chunked"
    return "compiled"


def sft_logits(stage: SftStage, examples: Examples, tokens: int) -> float:
    """Logits that supervised fine-tuning will make over a vocabulary of ``tokens``."""
    targets = sum(int(each.sum()) for each in examples.targets) / len(examples)
    return stage.steps * stage.batch_size * targets * tokens


def policy_logits(stage: PolicyStage, tokens: int) -> int:
    """Logits that policy optimisation will make at most, in its updates alone."""
    return stage.steps * stage.responses_per_step * stage.epochs * stage.rollout.max_new_tokens * tokens


def _compiler_found() -> bool:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return False
    return True
