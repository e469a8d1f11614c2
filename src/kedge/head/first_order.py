"""Backward passes that know first derivatives alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch


def first_order(backward: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
    """Refuse to run where a second derivative is asked for: it would be missing without a word.

    Raises:
        RuntimeError: under ``create_graph=True``.
    """

    @wraps(backward)
    def run(ctx: Any, *upstream: Any) -> tuple[Any, ...]:
        if torch.is_grad_enabled():  # how autograd runs a backward pass that is to be differentiated itself
            raise RuntimeError(
                "kedge.head has first derivatives only, and create_graph=True asks for a second: take "
                'backend="dense", which holds whole logits and has both, or leave create_graph out'
            )
        return backward(ctx, *upstream)

    return run
