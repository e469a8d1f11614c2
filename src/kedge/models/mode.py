"""Switches of a model: dropout, activation checkpointing, evaluation mode."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel

from kedge.errors import UserError

_DROPOUT_NAME = re.compile(r"drop(out|path)|_drop$|_pdrop$|layer_?drop|drop_path")


def disable_dropout(model: PreTrainedModel) -> PreTrainedModel:
    """Set every dropout rate of a model to zero, in training mode too.

    Rates live in three places: ``nn.Dropout`` modules, numbers that a module keeps for itself
    (``attention_dropout``), numbers that it reads from its configuration at each call. A policy that is
    scored with dropout on differs from itself, so the ratio to its own rollout is noise.

    Args:
        model: changed in place, its configuration included (a saved copy has no dropout either).

    Returns:
        The same model.

    >>> from kedge.models import build_model
    >>> model = build_model(32, architecture="gpt2", hidden_size=8, layers=1, heads=2, context=16, seed=0)
    >>> model.config.attn_pdrop
    0.1
    >>> disable_dropout(model).config.attn_pdrop
    0.0
    """
    holders: list[object] = []
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        holders.append(module)
        config = getattr(module, "config", None)
        if config is not None and not any(config is holder for holder in holders):
            holders.append(config)
    for holder in holders:
        for name, value in list(vars(holder).items()):
            if type(value) is float and _DROPOUT_NAME.search(name):
                setattr(holder, name, 0.0)
    return model


def enable_activation_checkpointing(model: PreTrainedModel) -> PreTrainedModel:
    """Recompute activations in backward instead of keeping them: less memory, about a third more time.

    It acts on layers in training mode alone; `recomputing` puts them there for a pass with gradients. Generation and
    scoring are as before.

    Raises:
        UserError: the architecture has no such switch.

    >>> from kedge.models import build_model
    >>> model = build_model(32, hidden_size=8, layers=1, heads=2, context=16, seed=0)
    >>> enable_activation_checkpointing(model).model.gradient_checkpointing
    True
    """
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise UserError(
            f"{type(model).__name__} does not support activation checkpointing: switch it off, "
            "or lower the micro-batch size to save memory"
        )
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable({"use_reentrant": False})
    else:  # what older releases of transformers 5 call it
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def disable_activation_checkpointing(model: PreTrainedModel) -> PreTrainedModel:
    """Keep activations for backward, as a model does that nobody has told otherwise, such as an earlier stage.

    >>> from kedge.models import build_model
    >>> model = build_model(32, hidden_size=8, layers=1, heads=2, context=16, seed=0)
    >>> disable_activation_checkpointing(enable_activation_checkpointing(model)).model.gradient_checkpointing
    False
    """
    if hasattr(model, "activation_checkpointing_disable"):
        model.activation_checkpointing_disable()
    else:  # what older releases of transformers 5 call it
        model.gradient_checkpointing_disable()
    return model


@contextmanager
def recomputing(model: nn.Module) -> Iterator[None]:
    """Let activation checkpointing act inside, in a model of any mode, if gradients are recorded.

    Only the checkpointed layers themselves are put in training mode, what they hold keeps its own.

    >>> layer = nn.Linear(2, 2).eval()
    >>> layer.gradient_checkpointing = True
    >>> with recomputing(layer):
    ...     layer.training
    True
    >>> layer.training
    False
    """
    layers = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    asleep = [layer for layer in layers if torch.is_grad_enabled() and not layer.training]
    for layer in asleep:
        layer.training = True
    try:
        yield
    finally:
        for layer in asleep:
            layer.training = False


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode inside; each module gets its own mode back afterwards.

    >>> layer = nn.Dropout().train()
    >>> with evaluating(layer):
    ...     layer.training
    False
    >>> layer.training
    True
    """
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training
