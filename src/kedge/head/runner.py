"""How the element-wise work on a chunk is run: operation by operation, or compiled into a few passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from kedge.head import elementwise
from kedge.head.compiler import rewriting
from kedge.head.elementwise import Plan
from kedge.head.gradients import Pull
from kedge.head.request import Output

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
    if any(made.changes(biases[source]) for source, made in plan.transforms):  # in one pass, then, of its own
        _run_compiled(elementwise.transform, Plan(plan.transforms, ()), products, biases)
    return _run_compiled(elementwise.score, plan, products, targets)


def _compiled_backward(plan: Plan, *tensors: Any) -> None:
    elementwise.backward(plan, *tensors, run=_compiled_overwrite)


def _compiled_overwrite(
    plan: Plan, logits: Any, chosen: Any, normalizers: Any, pulls: Mapping[Output, Pull]
) -> Any:
    plan = replace(plan, wanted=tuple(pulls))  # each set of outputs that pull is compiled for itself
    return _run_compiled(elementwise.overwrite, plan, logits, chosen, normalizers, pulls)


def _run_compiled(function: Function, plan: Plan, logits: Mapping[str, Tensor], *others: Any) -> Any:
    """Run a function of ``elementwise``, compiled for a plan and a vocabulary, whatever the number of rows."""
    rows, tokens = next(iter(logits.values())).shape
    for leaf in _tensors((logits, others)):
        if leaf.shape[0] == rows > 1:
            torch._dynamo.maybe_mark_dynamic(leaf, 0)
    for each in logits.values():
        torch._dynamo.mark_static(each, 1)
    return _compiled(function, plan, tokens)(logits, *others)


def _tensors(tree: Any) -> Iterator[Tensor]:
    for leaf in torch.utils._pytree.tree_leaves(tree):
        if isinstance(leaf, Pull):
            yield from (leaf.gradient, leaf.value)
        elif isinstance(leaf, Tensor):
            yield leaf


@cache
def _compiled(function: Function, plan: Plan, tokens: int) -> Function:
    options = {
        "realize_opcount_threshold": 1000,  # no intermediate [n, V], however many operations share it,
        "realize_reads_threshold": 1000,  # and however many columns it reads
        "post_grad_custom_pre_pass": rewriting(),
        "cpp.enable_floating_point_contract_flag": "fast",  # a product and a sum in one instruction
    }
    made: Function = torch.compile(  # type: ignore[call-overload]  # its overloads lack isolate_recompiles
        partial(function, plan), fullgraph=True, isolate_recompiles=True, options=options
    )
    return made


EAGER = Runner(elementwise.forward, elementwise.backward, 2**17)
COMPILED = Runner(_compiled_forward, _compiled_backward, 2**62)
