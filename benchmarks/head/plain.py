"""What people write in plain PyTorch: whole logits, gradients by autograd; and torch's own linear cross-entropy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.head.contender import PLAIN, Absent, Contender, Step
from benchmarks.head.inputs import RESPONSES, Inputs, Size
from benchmarks.head.losses import CACHED, CROSS_ENTROPY, EXACT, SAMPLED, loss_of

DENSE, COMPILED, LINEAR = "dense", "dense compiled", "torch linear_cross_entropy"

Selected = Callable[[Tensor, Tensor], Tensor]
"""From logits [N, V] and targets [N] to the log-probabilities of the targets."""


def plain_contenders(_: Size, device: torch.device) -> Iterator[Contender | Absent]:
    for family, compiles in ((DENSE, False), (COMPILED, True)):
        yield Contender(EXACT, family, "", partial(exact_step, compiles=compiles), PLAIN, compiles=compiles)
        build = partial(cross_entropy_step, compiles=compiles)
        yield Contender(CROSS_ENTROPY, family, "", build, PLAIN, compiles=compiles)
    build = partial(sampled_step, SAMPLED, selected=by_log_softmax, compiles=True)
    yield Contender(SAMPLED, COMPILED, "", build, PLAIN, compiles=True)
    for task in (SAMPLED, CACHED):
        for setting, selected in (("logsumexp a response", by_logsumexp), ("log_softmax", by_log_softmax)):
            yield Contender(task, DENSE, setting, partial(sampled_step, task, selected=selected), PLAIN)
    yield from _linear_cross_entropy()


def by_logsumexp(logits: Tensor, targets: Tensor) -> Tensor:
    """Subtract the log-normaliser from the chosen logit, one response at a time, as TRL's trainer does."""
    normalizer = torch.cat([part.logsumexp(-1) for part in logits.chunk(RESPONSES)])
    return logits.gather(-1, targets[:, None]).squeeze(-1) - normalizer


def by_log_softmax(logits: Tensor, targets: Tensor) -> Tensor:
    return logits.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)


def sampled_step(task: str, inputs: Inputs, *, selected: Selected, compiles: bool = False) -> Step:
    """The reference's log-probability without gradients, then the policy's; no entropy, which k3 does not need."""

    def log_prob_of(hidden: Tensor, weight: Tensor) -> Tensor:
        return _wide(selected(hidden @ weight.T, inputs.targets))

    score_of = _compiled(log_prob_of) if compiles else log_prob_of

    def step() -> Tensor:
        scores = {}
        if task == SAMPLED:
            with torch.no_grad():
                scores["reference.log_prob"] = score_of(inputs.reference_hidden, inputs.reference_weight)
        scores["log_prob"] = score_of(inputs.hidden, inputs.weight)
        return _finish(task, scores, inputs)

    return step


def exact_step(inputs: Inputs, *, compiles: bool) -> Step:
    scores_of = _compiled(_exact_scores) if compiles else _exact_scores
    reference = (inputs.reference_hidden, inputs.reference_weight)

    def step() -> Tensor:
        scores = scores_of(inputs.hidden, inputs.weight, *reference, inputs.targets)
        names = ("log_prob", "entropy", "reference.reverse_kl")
        return _finish(EXACT, dict(zip(names, scores, strict=True)), inputs)

    return step


def _exact_scores(
    hidden: Tensor, weight: Tensor, reference_hidden: Tensor, reference_weight: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Keep no logits beside their log-probabilities: the least that can be written plainly."""
    with torch.no_grad():
        log_q = _wide(reference_hidden @ reference_weight.T).log_softmax(-1)
    log_p = _wide(hidden @ weight.T).log_softmax(-1)
    p = log_p.exp()
    chosen = log_p.gather(-1, targets[:, None]).squeeze(-1)
    return chosen, -(p * log_p).sum(-1), (p * (log_p - log_q)).sum(-1)


def cross_entropy_step(inputs: Inputs, *, compiles: bool) -> Step:
    loss_of_logits = _compiled(_mean_loss) if compiles else _mean_loss

    def step() -> Tensor:
        loss = loss_of_logits(inputs.hidden, inputs.weight, inputs.targets)
        loss.backward()
        return loss.detach()

    return step


def _mean_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(_wide(hidden @ weight.T), targets)


def _linear_cross_entropy() -> Iterator[Contender | Absent]:
    if not hasattr(functional, "linear_cross_entropy"):
        reason = f"torch {torch.__version__} has none"
        yield Absent(CROSS_ENTROPY, LINEAR, reason)
        return
    for setting, options in (("options chosen by torch", {}), ("512 rows", {"batch_chunk_size": 512})):
        build = partial(_linear, options=options)
        yield Contender(
            CROSS_ENTROPY, LINEAR, setting, build, PLAIN, dict(options), default=setting.startswith("options")
        )


def _linear(inputs: Inputs, *, options: dict[str, Any]) -> Step:
    chosen = torch.nn.LinearCrossEntropyOptions(**options)

    def step() -> Tensor:
        loss = functional.linear_cross_entropy(inputs.hidden, inputs.weight, inputs.targets, options=chosen)
        loss.backward()
        return loss.detach()

    return step


def _finish(task: str, scores: dict[str, Tensor], inputs: Inputs) -> Tensor:
    loss = loss_of(task, scores, inputs, slice(0, inputs.size.rows))
    loss.backward()
    return loss.detach()


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    made: Callable[..., Any] = torch.compile(function, fullgraph=True)
    return made


def _wide(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()
