"""The linear layers of a model, inside a pass, by the product that is fast on the processor."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from kedge.head.products import WORTH, multiply, onednn, reachable


@contextmanager
def fast_linears(model: nn.Module, rows: int) -> Iterator[None]:
    """Let the linear layers of a model go through :func:`kedge.head.products.multiply` inside, backward included.

    Where that is PyTorch's own product nothing is changed, nor are layers that somebody has given a forward pass of
    their own, or compiled. Inside, activations that are computed again in backward, or kept elsewhere until then, are
    left to PyTorch, too. Gradients are first-order.

    Args:
        model: whose layers are meant.
        rows: how many tokens a pass has at most; layers too small for the faster product then are left alone.

    >>> layer = nn.Linear(2000, 2)
    >>> with fast_linears(layer, 1000):
    ...     inside = "forward" in vars(layer)
    >>> inside == (onednn() is not None), "forward" in vars(layer)
    (True, False)
    """
    layers = [each for each in model.modules() if type(each) is nn.Linear and _is_meant(each, rows)]
    patched = layers if layers and onednn() is not None else []
    try:
        for layer in patched:
            vars(layer)["forward"] = partial(_forward, layer)
        yield
    finally:
        for layer in patched:
            vars(layer).pop("forward", None)


def _is_meant(layer: nn.Linear, rows: int) -> bool:
    return (
        "forward" not in vars(layer)
        and layer._compiled_call_impl is None
        and rows * layer.weight.numel() >= WORTH
        and reachable(layer.weight)
    )


def _forward(layer: nn.Linear, inputs: Tensor) -> Tensor:
    if _is_fast(inputs, layer.weight):
        found: Tensor = _Linear.apply(inputs, layer.weight, layer.bias)
        return found
    return nn.functional.linear(inputs, layer.weight, layer.bias)


def _is_fast(inputs: Tensor, weight: Tensor) -> bool:
    return (
        inputs.ndim > 1
        and inputs.shape[-1] == weight.shape[1]
        and inputs[..., 0].numel() * weight.numel() >= WORTH
        and reachable(inputs, weight)
        and not torch.is_autocast_enabled("cpu")
        and not (torch.is_grad_enabled() and _are_kept_elsewhere())
    )


def _are_kept_elsewhere() -> bool:
    """Whether somebody takes what backward needs out of our hands, as activation checkpointing does."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


class _Linear(torch.autograd.Function):
    """y = x Wᵀ + b."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        of_inputs, of_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(inputs if of_weight else None, weight if of_inputs else None)
        outputs = inputs.new_empty(*inputs.shape[:-1], weight.shape[0])
        multiply(inputs.flatten(0, -2), weight.T, outputs.flatten(0, -2))
        return outputs if bias is None else outputs.add_(bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight = ctx.saved_tensors
        rows, to_inputs, to_weight = gradient.flatten(0, -2), None, None
        if weight is not None:
            to_inputs = gradient.new_empty(*gradient.shape[:-1], weight.shape[1])
            multiply(rows, weight, to_inputs.flatten(0, -2))
        if inputs is not None:
            to_weight = gradient.new_empty(gradient.shape[-1], inputs.shape[-1])
            multiply(rows.T, inputs.flatten(0, -2), to_weight)
        return to_inputs, to_weight, rows.sum(0) if ctx.needs_input_grad[2] else None
