"""The head in chunks of rows: there are never more logits than those of one chunk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kedge.head.first_order import first_order
from kedge.head.gradients import Pull
from kedge.head.request import (
    POLICY,
    TOKEN_OUTPUTS,
    Output,
    Request,
    checked_loss,
    moves,
    public_name,
)
from kedge.head.runner import Runner
from kedge.head.types import PerToken
from kedge.head.workspace import Workspace

_WITH_BOTH = 'backend="dense", which holds whole logits and has both'


def chunked_scores(request: Request, chunk_rows: int, runner: Runner) -> dict[Output, Tensor]:
    """Return every wanted output, [N] each, differentiable.

    Backward makes the logits a second time, unless the policy's hidden states alone train and few outputs depend on
    them: then the gradient of each is made in forward, [N, H].
    """
    trains = _trains(request)
    apply: Callable[..., tuple[Tensor, ...]] = _Kept.apply if _few(request, trains) else _Score.apply
    values = apply(request, chunk_rows, runner, *request.tensors())
    return dict(zip(request.wanted, values, strict=True))


def chunked_loss(
    request: Request, per_token: PerToken, chunk_rows: int, runner: Runner
) -> tuple[Tensor, dict[Output, Tensor]]:
    """Return the loss, whose gradients are made here, and every wanted output, [N] each, detached."""
    apply: Callable[..., tuple[Tensor, ...]] = _Loss.apply
    call = partial(_call, per_token, torch.is_grad_enabled())
    loss, *values = apply(request, call, chunk_rows, runner, _trains(request), *request.tensors())
    return loss, dict(zip(request.wanted, values, strict=True))


class _Score(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, request: Request, chunk_rows: int, runner: Runner, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.request, ctx.chunk_rows, ctx.runner = request.outline(), chunk_rows, runner
        ctx.needs = ctx.needs_input_grad[3:]
        workspace = Workspace(request.with_tensors(tensors), chunk_rows, [False] * len(tensors), runner)
        scores = _empty_scores(request)
        for rows in _chunks(request, chunk_rows):
            for output, values in workspace.load(rows, request.wanted).items():
                scores[output][rows] = values
        ctx.save_for_backward(request.targets, *tensors, *scores.values())
        fixed = set(request.wanted) - _differentiable(request, ctx.needs)
        ctx.mark_non_differentiable(*(scores[output] for output in fixed))
        ctx.set_materialize_grads(False)
        return tuple(scores.values())

    @staticmethod
    @first_order(_WITH_BOTH)
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Any, ...]:
        targets, *saved = ctx.saved_tensors  # unpacked once: checkpointing allows no more
        tensors, scores = saved[: len(ctx.needs)], saved[len(ctx.needs) :]
        wanted = ctx.request.wanted
        pulled = {each: pull for each, pull in zip(wanted, upstream, strict=True) if pull is not None}
        found = {each: values for each, values in zip(wanted, scores, strict=True) if each in pulled}
        request = replace(ctx.request.with_tensors(tensors), wanted=tuple(pulled), targets=targets)
        workspace = Workspace(request, ctx.chunk_rows, ctx.needs, ctx.runner)
        for rows in _chunks(request, ctx.chunk_rows):
            workspace.load(rows, ())
            workspace.backward(_rows_of(pulled, rows), _rows_of(found, rows))
        return None, None, None, *_cast(workspace.gradients(), [each.dtype for each in tensors])


class _Kept(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, request: Request, chunk_rows: int, runner: Runner, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        needs = [True] + [False] * (len(tensors) - 1)
        workspace = Workspace(request.with_tensors(tensors), chunk_rows, needs, runner)
        scores, moving = _empty_scores(request), _differentiable(request, needs)
        kept = {
            output: torch.empty_like(tensors[0], dtype=request.dtype) for output in scores if output in moving
        }
        for rows in _chunks(request, chunk_rows):
            found = workspace.load(rows, request.wanted)
            for output, values in found.items():
                scores[output][rows] = values
            for output, gradient in workspace.hidden_gradients({output: found[output] for output in kept}):
                kept[output][rows] = gradient
        ctx.dtype, ctx.places = tensors[0].dtype, [list(scores).index(output) for output in kept]
        ctx.save_for_backward(*(scores[output] for output in kept), *kept.values())
        ctx.mark_non_differentiable(*(values for output, values in scores.items() if output not in kept))
        ctx.set_materialize_grads(False)
        return tuple(scores.values())

    @staticmethod
    @first_order(_WITH_BOTH)
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Any, ...]:
        count, saved = len(ctx.places), ctx.saved_tensors  # unpacked once: checkpointing allows no more
        total = torch.zeros_like(saved[count])
        for place, values, gradient in zip(ctx.places, saved[:count], saved[count:], strict=True):
            pull = upstream[place]
            if pull is not None:
                total.addcmul_(Pull.of(pull, values).gradient, gradient)
        return None, None, None, total.to(ctx.dtype), *(None for _ in ctx.needs_input_grad[4:])


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        request: Request,
        call: Callable[..., tuple[Tensor, dict[Output, Tensor]]],
        chunk_rows: int,
        runner: Runner,
        needs: list[bool],
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        workspace = Workspace(request.with_tensors(tensors), chunk_rows, needs, runner)
        scores, differentiable = _empty_scores(request), _differentiable(request, needs)
        loss = tensors[0].new_zeros((), dtype=request.dtype)
        for rows in _chunks(request, chunk_rows):
            found = workspace.load(rows, request.wanted)
            for output, values in found.items():
                scores[output][rows] = values
            part, upstream = call(found, rows, differentiable)
            loss += part
            workspace.backward(upstream, _rows_of(scores, rows))  # what was found may have been written over
        ctx.gradients, ctx.dtypes = workspace.gradients(), [each.dtype for each in tensors]
        ctx.mark_non_differentiable(*scores.values())
        ctx.set_materialize_grads(False)
        return loss, *scores.values()

    @staticmethod
    @first_order(_WITH_BOTH)
    def backward(ctx: Any, upstream: Tensor, *_: None) -> tuple[Any, ...]:
        if ctx.gradients is None:
            raise RuntimeError(
                "backward ran twice through one kedge.head.reduce, whose gradients are made in forward and "
                "handed out once; call reduce again, or use kedge.head.score"
            )
        gradients, ctx.gradients = ctx.gradients, None
        if upstream.device.type != "cpu" or upstream != 1.0:  # elsewhere a look would wait for it
            gradients = [None if each is None else each.mul_(upstream) for each in gradients]
        # only now: gradients of a scaled loss would vanish in float16, and be rounded twice in bfloat16
        return None, None, None, None, None, *_cast(gradients, ctx.dtypes)


def _trains(request: Request) -> list[bool]:
    return [torch.is_grad_enabled() and tensor.requires_grad for tensor in request.tensors()]


def _few(request: Request, trains: Sequence[bool]) -> bool:
    """Whether gradients of hidden states, made in forward, take fewer products than the logits made again.

    With A distributions and k outputs A + k products stand against 2A + 1.
    """
    hidden_alone = trains[0] and not any(trains[1:])
    return hidden_alone and 0 < len(_differentiable(request, trains)) <= len(request.involved)


def _call(
    per_token: PerToken,
    graded: bool,
    scores: dict[Output, Tensor],
    rows: slice,
    differentiable: set[Output],
) -> tuple[Tensor, dict[Output, Tensor]]:
    """Return the loss of a chunk, and its gradients with respect to the scores that it depends on."""
    with torch.set_grad_enabled(graded):
        leaves = {
            output: values.detach().requires_grad_(output in differentiable)
            for output, values in scores.items()
        }
        loss = checked_loss(per_token({public_name(output): leaf for output, leaf in leaves.items()}, rows))
    if not loss.requires_grad:
        return loss, {}
    _refuse_others(loss, list(leaves.values()))
    inputs = {output: leaf for output, leaf in leaves.items() if leaf.requires_grad}
    pulls = torch.autograd.grad(loss, list(inputs.values()), allow_unused=True)
    return loss.detach(), {
        output: pull for output, pull in zip(inputs, pulls, strict=True) if pull is not None
    }


def _refuse_others(loss: Tensor, scores: Sequence[Tensor]) -> None:
    """Refuse a loss that depends on a parameter besides the scores, whose gradient would be missing in silence."""
    seen, ahead = set(), [loss.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None and all(leaf is not each for each in scores):
            raise ValueError(
                f"per_token depends on a tensor of shape {tuple(leaf.shape)} that requires a gradient and is none of "
                "this chunk's scores: reduce has no gradient for it. Detach it, or use kedge.head.score"
            )
        ahead += [following for following, _ in node.next_functions]


def _differentiable(request: Request, needs: Sequence[bool]) -> set[Output]:
    """Return the outputs that depend on something that needs a gradient."""
    trains = {source for source, needed in request.by_source(needs).items() if any(needed)}
    return {output for output in request.wanted if any(moves(output, source) for source in trains)}


def _cast(gradients: Sequence[Tensor | None], dtypes: Sequence[torch.dtype]) -> list[Tensor | None]:
    return [None if each is None else each.to(dtype) for each, dtype in zip(gradients, dtypes, strict=True)]


def _empty_scores(request: Request) -> dict[Output, Tensor]:
    hidden = request.sources[POLICY].hidden
    dtypes = {each: torch.int64 if each[1] in TOKEN_OUTPUTS else request.dtype for each in request.wanted}
    return {each: hidden.new_empty(hidden.shape[0], dtype=dtype) for each, dtype in dtypes.items()}


def _chunks(request: Request, chunk_rows: int) -> list[slice]:
    count = request.targets.shape[0]
    return [slice(start, min(start + chunk_rows, count)) for start in range(0, count, chunk_rows)]


def _rows_of(columns: dict[Output, Tensor], rows: slice) -> dict[Output, Tensor]:
    return {output: values[rows] for output, values in columns.items()}
