"""Per-token scores of logits that a caller already holds, differentiable, for any loss."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kedge.divergence import Normalizer, finite
from kedge.head import triton_runner
from kedge.head.backend import RUNNERS, chosen_runner, default_chunk_rows
from kedge.head.elementwise import Normalizers, Plan, Transform
from kedge.head.first_order import first_order
from kedge.head.gradients import Pull
from kedge.head.request import (
    POLICY,
    Output,
    check_targets,
    involved,
    moves,
    public_name,
    read_want,
)
from kedge.head.runner import EAGER, Runner

_AS_THEY_ARE = Transform(scale=1.0, softcap=None, temperature=1.0)
_COPIED = 2**20  # logits at a time on a CPU


def score_logits(
    logits: Float[Tensor, "N V"],
    targets: Int[Tensor, " N"],
    *,
    anchors: Mapping[str, Float[Tensor, "N V"]] | None = None,
    want: Collection[str],
    backend: str = "auto",
) -> dict[str, Float[Tensor, " N"]]:
    """Score each token by its logits, and compare the policy with its anchors over the whole vocabulary.

        log_prob = l_a − log Σ e^l, …: the outputs of ``score``, of logits l as they are

    A logit of −∞ masks its entry; one at least is left in every row. Half precision is read as float32; what was
    lost by rounding logits to it, a small KL above all, stays lost (``score`` never rounds them). The logits are
    neither written to nor, by the Triton kernels, copied; backward allocates the gradients only (in half precision and
    with several anchors that are compared, the policy's once more in float32).

    Args:
        logits: the policy's, [N, V], final: divide them by a temperature before.
        targets: the tokens, Int[N].
        anchors: name → logits [N, V] of the same tokens.
        want: names of outputs, as in ``score``.
        backend: "triton" runs kernels for NVIDIA GPUs (float64, and rows that are not dense, run as "chunked");
            "chunked" runs torch's operations, on a CPU over a few rows at a time; "compiled" the same, fused by
            torch's compiler, which takes some ten seconds at the first call of each kind;
            "auto" is "triton" on such a device where Triton is installed, "chunked" elsewhere.

    Returns:
        For each name in ``want`` a tensor [N], in nats (total variation: between 0 and 1); float64 if any
        logits are, else float32.

    Raises:
        ValueError: for unknown names, sizes that do not fit, a backend that is unknown or that the device or the
            installation lacks, and, on CPU, targets that are not in the vocabulary.

    Source: as ``score``.

    >>> import torch
    >>> policy, reference = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    >>> want = {"log_prob", "reference.reverse_kl"}
    >>> scores = score_logits(policy, torch.tensor([0]), anchors={"reference": reference}, want=want)
    >>> {name: round(value.item(), 6) for name, value in scores.items()}
    {'log_prob': -0.693147, 'reference.reverse_kl': 0.143841}
    """
    sources = {POLICY: logits, **(anchors or {})}
    runner = _checked(sources, targets, anchors, backend)
    wanted = read_want(want, anchors or {})
    names = involved(sources, wanted)
    apply: Callable[..., tuple[Tensor, ...]] = _Score.apply
    values = apply(wanted, names, runner, targets.to(torch.int64), *(sources[name] for name in names))
    return {public_name(output): value for output, value in zip(wanted, values, strict=True)}


class _Score(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        wanted: tuple[Output, ...],
        names: list[str],
        runner: Runner,
        targets: Tensor,
        *logits: Tensor,
    ) -> tuple[Tensor, ...]:
        sources, plan = dict(zip(names, logits, strict=True)), _plan(names, wanted)
        if runner is triton_runner.TRITON and triton_runner.suits(logits):
            normalizers, scores = triton_runner.forward(plan, sources, dict.fromkeys(names), targets)
        else:
            normalizers, scores = _score(plan, _in_blocks(runner), sources, targets)
        ctx.wanted, ctx.names, ctx.runner, ctx.needs = wanted, names, runner, ctx.needs_input_grad[4:]
        parts = [part for name in names for part in normalizers[name]]
        ctx.save_for_backward(targets, *logits, *parts, *scores.values())
        trains = {name for name, needed in zip(names, ctx.needs, strict=True) if needed}
        fixed = (
            values for output, values in scores.items() if not any(moves(output, source) for source in trains)
        )
        ctx.mark_non_differentiable(*fixed)
        ctx.set_materialize_grads(False)
        return tuple(scores.values())

    @staticmethod
    @first_order("the functions of kedge.divergence, which have both")
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Any, ...]:
        names, count = ctx.names, len(ctx.names)
        targets, *saved = ctx.saved_tensors  # unpacked once: who packs them may count
        sources = dict(zip(names, saved[:count], strict=True))
        parts, scores = saved[count : 3 * count], saved[3 * count :]
        normalizers = {name: Normalizer(*parts[2 * i : 2 * i + 2]) for i, name in enumerate(names)}
        pulls = {
            output: Pull.of(pull, value)
            for output, pull, value in zip(ctx.wanted, upstream, scores, strict=True)
            if pull is not None
        }
        gradients = {
            name: torch.empty_like(sources[name])
            for name, needed in zip(names, ctx.needs, strict=True)
            if needed and any(moves(output, name) for output in pulls)
        }
        plan = _plan(names, (), tuple(gradients))
        if ctx.runner is triton_runner.TRITON and triton_runner.suits(sources.values()):
            triton_runner.write_gradients(plan, gradients, sources, normalizers, targets, pulls)
        else:
            _write_gradients(plan, _in_blocks(ctx.runner), gradients, sources, normalizers, targets, pulls)
        return None, None, None, None, *map(gradients.get, names)


def _checked(
    sources: Mapping[str, Tensor], targets: Tensor, anchors: Mapping[str, Tensor] | None, backend: str
) -> Runner:
    policy = sources[POLICY]
    if POLICY in (anchors or {}):
        raise ValueError(f"an anchor is named {POLICY!r}, as the policy itself is; give it another name")
    for name, each in sources.items():
        if each.ndim != 2 or each.shape != policy.shape:
            raise ValueError(
                f"{name!r} has logits of shape {tuple(each.shape)}, the policy {tuple(policy.shape)}; "
                "both must be [tokens, vocabulary], and the same"
            )
    rows, tokens = policy.shape
    check_targets(targets, rows, tokens, policy.device)
    runner = chosen_runner(backend, policy.device) if backend in ("auto", *RUNNERS) else None
    if runner is None:
        raise ValueError(
            f"backend is {backend!r}; for logits it must be one of: {', '.join(('auto', *RUNNERS))}"
        )
    return runner


def _plan(names: list[str], wanted: tuple[Output, ...], moved: tuple[str, ...] = ()) -> Plan:
    return Plan(tuple((name, _AS_THEY_ARE) for name in names), wanted, moved)


def _in_blocks(runner: Runner) -> Runner:
    """Give what works on copies of a few rows: what the kernels do not take, torch's operations do."""
    return EAGER if runner is triton_runner.TRITON else runner


def _score(
    plan: Plan, runner: Runner, sources: Mapping[str, Tensor], targets: Tensor
) -> tuple[Normalizers, dict[Output, Tensor]]:
    found = [
        runner.forward(plan, _copy(sources, rows), dict.fromkeys(sources), targets[rows])
        for rows in _blocks(runner, sources)
    ]
    normalizers = {
        name: Normalizer(*map(torch.cat, zip(*(each[name] for each, _ in found), strict=True)))
        for name in sources
    }
    return normalizers, {output: torch.cat([scores[output] for _, scores in found]) for output in plan.wanted}


def _write_gradients(
    plan: Plan,
    runner: Runner,
    gradients: Mapping[str, Tensor],
    sources: Mapping[str, Tensor],
    normalizers: Normalizers,
    targets: Tensor,
    pulls: Mapping[Output, Pull],
) -> None:
    for rows in _blocks(runner, sources):
        block = _copy(sources, rows)
        parts = {name: Normalizer(*(part[rows] for part in each)) for name, each in normalizers.items()}
        here = {output: pull[rows] for output, pull in pulls.items()}
        apart = {name: gradient[rows] for name, gradient in gradients.items()}
        runner.backward(plan, block, parts, targets[rows], here, apart)


def _copy(sources: Mapping[str, Tensor], rows: slice) -> dict[str, Tensor]:
    """Return finite logits of some rows, all float64 if any is, else float32, to be written over."""
    doubles = any(each.dtype == torch.float64 for each in sources.values())
    dtype = torch.float64 if doubles else torch.float32
    return {name: finite(each[rows].to(dtype)) for name, each in sources.items()}


def _blocks(runner: Runner, sources: Mapping[str, Tensor]) -> list[slice]:
    """Cut the rows into blocks whose intermediates, a dozen of them, are small beside the logits."""
    logits = sources[POLICY] if POLICY in sources else next(iter(sources.values()))
    rows, tokens = logits.shape
    if logits.device.type == "cpu":
        some = replace(runner, block_logits=min(runner.block_logits, _COPIED))
        return some.blocks(logits) or [slice(0, 0)]
    step = default_chunk_rows(tokens, logits.device.type)
    return [slice(start, min(start + step, rows)) for start in range(0, max(rows, 1), step)]
