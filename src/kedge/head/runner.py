"""How the element-wise work on a chunk is run: operation by operation, or compiled into a few passes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from kedge.head import elementwise
from kedge.head.elementwise import Plan

Function = Callable[..., Any]


@dataclass(frozen=True)
class Runner:
    """Runs the functions of ``elementwise`` on blocks of rows.

    Args:
        forward: ``elementwise.forward``, or what does the same.
        backward: ``elementwise.backward``, or what does the same.
        block_logits: about how many logits a block has on a CPU; elsewhere a block is the chunk.
    """

    forward: Function
    backward: Function
    block_logits: int

    def blocks(self, logits: Tensor) -> list[slice]:
        """Cut the rows of a chunk into blocks; none is a single row that could have been avoided."""
        rows, tokens = logits.shape
        step = max(2, self.block_logits // tokens) if logits.device.type == "cpu" else max(1, rows)
        ends = list(range(step, rows - 1, step)) + [rows] * (rows > 0)
        return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def _compiled_forward(plan: Plan, products: Any, biases: Any, targets: Tensor) -> Any:
    _any_rows(products, targets)
    return _compiled(elementwise.forward, plan)(products, biases, targets)


def _compiled_backward(plan: Plan, *tensors: Any) -> None:
    _any_rows(*tensors)
    _compiled(elementwise.backward, plan)(*tensors)


@cache
def _compiled(function: Function, plan: Plan) -> Function:
    """Compile for a plan; a vocabulary of another size compiles again, a third number of rows does not."""
    options = {"realize_opcount_threshold": 1000}  # no intermediate [n, V], however many operations share it
    made: Function = torch.compile(  # type: ignore[call-overload]  # its overloads lack isolate_recompiles
        partial(function, plan), fullgraph=True, isolate_recompiles=True, options=options
    )
    return made


def _any_rows(*trees: Any) -> None:
    """Say that the first size of every tensor may be another next time."""
    for leaf in torch.utils._pytree.tree_leaves(trees):
        if isinstance(leaf, Tensor) and leaf.shape[0] > 1:
            torch._dynamo.maybe_mark_dynamic(leaf, 0)


EAGER = Runner(elementwise.forward, elementwise.backward, 2**17)
COMPILED = Runner(_compiled_forward, _compiled_backward, 2**20)
