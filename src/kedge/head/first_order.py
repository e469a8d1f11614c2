"""Backward passes that know first derivatives alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

Backward = Callable[..., tuple[Any, ...]]


def first_order(instead: str) -> Callable[[Backward], Backward]:
    """Refuse to run where a second derivative is asked for: it would be missing without a word.

    Args:
        instead: what has second derivatives, too.

    Raises:
        RuntimeError: under ``create_graph=True``.
    """

    def guard(backward: Backward) -> Backward:
        @wraps(backward)
        def run(ctx: Any, *upstream: Any) -> tuple[Any, ...]:
            if torch.is_grad_enabled():  # as autograd runs what is to be differentiated itself
                raise RuntimeError(
                    "kedge.head has first derivatives only here, and create_graph=True asks for a second: take "
                    f"{instead}, or leave create_graph out"
                )
            return backward(ctx, *upstream)

        return run

    return guard
