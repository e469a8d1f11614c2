"""The linear layers of a model, inside a pass, by the product that is fast on the processor."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from kedge.head.products import WORTH, multiply, onednn


@contextmanager
def fast_linears(model: nn.Module, rows: int) -> Iterator[None]:
    """Let the linear layers of a model go through :func:`kedge.head.products.multiply` inside, backward included.

    Where that is PyTorch's own product nothing is changed, nor are layers that somebody has given a forward pass of
    their own, or the layers of a model that computes activations again in backward: then it would be outside.

    Args:
        model: whose layers are meant.
        rows: how many tokens a pass has at most; layers too small for the faster product then are left alone.

    >>> layer = nn.Linear(2, 2)
    >>> with fast_linears(layer, 1), torch.no_grad():
    ...     same = torch.equal(layer(torch.ones(1, 2)), nn.functional.linear(torch.ones(1, 2), *layer.parameters()))
    >>> same, "forward" in vars(layer)
    (True, False)
    """
    layers = _layers(model, rows) if onednn() is not None else []
    for layer in layers:
        vars(layer)["forward"] = partial(_forward, layer)
    try:
        yield
    finally:
        for layer in layers:
            del vars(layer)["forward"]


def _layers(model: nn.Module, rows: int) -> list[nn.Linear]:
    modules = list(model.modules())
    if torch.is_grad_enabled() and any(getattr(each, "gradient_checkpointing", False) for each in modules):
        return []
    plain = (each for each in modules if type(each) is nn.Linear and "forward" not in vars(each))
    return [each for each in plain if rows * each.weight.numel() >= WORTH]


def _forward(layer: nn.Linear, inputs: Tensor) -> Tensor:
    weight, bias = layer.weight, layer.bias
    plain = inputs.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    if plain and inputs.ndim > 1 and inputs[..., 0].numel() * weight.numel() >= WORTH:
        found: Tensor = _Linear.apply(inputs, weight, bias)
        return found
    return nn.functional.linear(inputs, weight, bias)


class _Linear(torch.autograd.Function):
    """y = x Wᵀ + b."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        outputs = inputs.new_empty(*inputs.shape[:-1], weight.shape[0])
        multiply(inputs.flatten(0, -2), weight.T, outputs.flatten(0, -2))
        return outputs if bias is None else outputs.add_(bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight = ctx.saved_tensors
        of_inputs, of_weight, of_bias = ctx.needs_input_grad
        rows = gradient.flatten(0, -2)
        to_inputs = to_weight = None
        if of_inputs:
            to_inputs = inputs.new_empty(inputs.shape)
            multiply(rows, weight, to_inputs.flatten(0, -2))
        if of_weight:
            to_weight = multiply(rows.T, inputs.flatten(0, -2), weight.new_empty(weight.shape))
        return to_inputs, to_weight, rows.sum(0) if of_bias else None
