"""Other libraries, each called as its documentation says; absent ones with the reason."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec

import torch
from torch import Tensor

from benchmarks.head.contender import PEER, Absent, Contender, Step
from benchmarks.head.inputs import RESPONSES, Inputs, Size
from benchmarks.head.losses import BETA, CLIP, CROSS_ENTROPY, SAMPLED
from benchmarks.head.plain import sampled_step

LIGER, TRL, CCE = "liger fused linear GRPO", "trl selective_log_softmax", "cut-cross-entropy"
LIGER_CE = "liger fused linear cross-entropy"
GPU_ONLY = "runs on GPUs only"
ABSENT = "not installed; PEERS=1 make bench-head installs it"


def peer_contenders(_: Size, device: torch.device) -> Iterator[Contender | Absent]:
    yield from _if_there("liger_kernel", SAMPLED, LIGER, _liger)
    yield from _if_there("trl", SAMPLED, TRL, _trl)
    yield from _if_there("cut_cross_entropy", CROSS_ENTROPY, CCE, lambda: _cut(device))
    if device.type == "cpu":
        yield Absent(CROSS_ENTROPY, LIGER_CE, GPU_ONLY)
    else:
        yield from _if_there("liger_kernel", CROSS_ENTROPY, LIGER_CE, _liger_cross_entropy)


def _if_there(
    module: str, task: str, family: str, make: Callable[[], Iterator[Contender]]
) -> Iterator[Contender | Absent]:
    if find_spec(module) is None:
        yield Absent(task, family, ABSENT)
    else:
        yield from make()


def _liger() -> Iterator[Contender]:
    """Its chunks are whole responses; loss "bnpo" is the mean over tokens. Its k3 needs the reference's states."""
    for responses in (1, RESPONSES):
        for compiled in (True, False):
            settings = {"chunk_size": responses, "compiled": compiled, "loss_type": "bnpo"}
            yield Contender(
                SAMPLED,
                LIGER,
                f"{responses} response{'s' * (responses > 1)} a chunk, {'compiled' if compiled else 'eager'}",
                lambda inputs, settings=settings: _liger_step(inputs, settings),
                PEER,
                settings,
                compiles=compiled,
                default=responses == 1 and compiled,
            )


def _liger_step(inputs: Inputs, settings: dict[str, object]) -> Step:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    module = LigerFusedLinearGRPOLoss(
        beta=BETA, epsilon_low=CLIP, epsilon_high=CLIP, use_ref_model=True, **settings
    )
    shape = (RESPONSES, inputs.size.rows // RESPONSES)
    mask = torch.ones(shape, device=inputs.hidden.device)

    def step() -> Tensor:
        loss, _ = module(
            inputs.hidden.view(*shape, -1),
            inputs.weight,
            inputs.targets.view(shape),
            mask,
            inputs.advantages,
            old_per_token_logps=inputs.old_log_prob.view(shape),
            ref_input=inputs.reference_hidden.view(*shape, -1),
            ref_weight=inputs.reference_weight,
        )
        loss.backward()
        return loss.detach()

    return step


def _trl() -> Iterator[Contender]:
    def build(inputs: Inputs) -> Step:
        from trl.trainer.utils import selective_log_softmax

        def selected(logits: Tensor, targets: Tensor) -> Tensor:
            shape = (RESPONSES, inputs.size.rows // RESPONSES)
            found: Tensor = selective_log_softmax(logits.view(*shape, -1), targets.view(shape))
            return found.reshape(-1)

        return sampled_step(SAMPLED, inputs, selected=selected)

    yield Contender(SAMPLED, TRL, "", build, PEER, default=True)


def _cut(device: torch.device) -> Iterator[Contender]:
    for implementation in ("cce", "torch_compile") if device.type == "cuda" else ("torch_compile",):

        def build(inputs: Inputs, implementation: str = implementation) -> Step:
            from cut_cross_entropy import linear_cross_entropy

            def step() -> Tensor:
                loss = linear_cross_entropy(inputs.hidden, inputs.weight, inputs.targets, impl=implementation)
                loss.backward()
                return loss.detach()

            return step

        settings = {"impl": implementation}
        yield Contender(CROSS_ENTROPY, CCE, implementation, build, PEER, settings, compiles=True)


def _liger_cross_entropy() -> Iterator[Contender]:
    def build(inputs: Inputs) -> Step:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        module = LigerFusedLinearCrossEntropyLoss()

        def step() -> Tensor:
            loss: Tensor = module(inputs.weight, inputs.hidden, inputs.targets)
            loss.backward()
            return loss.detach()

        return step

    yield Contender(CROSS_ENTROPY, LIGER_CE, "", build, PEER, default=True)
