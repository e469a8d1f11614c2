"""What torch's compiler is told about float32 numbers on a CPU, where it would lose time or digits.

Exponentials become one expression; what is reduced over a whole vocabulary is reduced over parts of it first. The
formulas do not say so: a pass over the compiler's graph puts both in their place.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from kedge.head.exponential import exponential

_LONGEST = 128
"""Vectors of a part. A compiled sum by itself adds 4,096 in a row, and equal terms are off by n·ε then."""
_REDUCTIONS: dict[Any, Callable[..., Tensor]] = {
    torch.ops.aten.sum.dim_IntList: torch.sum,
    torch.ops.aten.amin.default: torch.amin,  # left whole, it would need a loop of its own over the same terms
}


def part_length(tokens: int, lanes: int) -> int:
    """Return how many entries of a vocabulary are summed by themselves first: equal parts, if there are such.

    A vocabulary that is padded has them, because it is a multiple of 64; a tokenizer's own may be a prime. What is left
    behind the last whole part is one more.

    Args:
        tokens: the vocabulary's.
        lanes: the numbers in a vector, 16 with AVX-512.

    >>> [part_length(tokens, 16) for tokens in (45, 32_000, 50_257, 151_665, 151_936)]
    [45, 2000, 1733, 2048, 1187]
    """
    longest = _LONGEST * lanes
    fewest = -(-tokens // longest)
    return next((tokens // count for count in range(fewest, 2 * fewest) if tokens % count == 0), longest)


@cache
def rewriting() -> Any:
    """Return the compiler's pass, as its option ``post_grad_custom_pre_pass`` takes it."""
    from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
    from torch._inductor.pattern_matcher import PatternMatcherPass

    patterns = PatternMatcherPass()
    _inline_exponentials(patterns)
    _reduce_in_parts(patterns)

    class Rewriting(CustomGraphPass):
        def __call__(self, graph: torch.fx.Graph) -> None:
            patterns.apply(graph)

        def uuid(self) -> bytes:
            return get_hash_for_files((__file__, exponential.__code__.co_filename))

    return Rewriting()


def _inline_exponentials(patterns: Any) -> None:
    from torch._inductor.pattern_matcher import Arg, CallFunction, Match, register_graph_pattern

    pattern = CallFunction(torch.ops.aten.exp.default, Arg())

    @register_graph_pattern(pattern, extra_check=_in_float32_on_cpu, pass_dict=patterns)
    def put_in_place(match: Match, x: Any) -> None:
        match.replace_by_example(exponential, [x])


def _reduce_in_parts(patterns: Any) -> None:
    from torch._inductor.pattern_matcher import Arg, CallFunction, Match, register_graph_pattern

    def is_long(match: Match) -> bool:
        terms: Any = match.output_node().args[0]
        shape = terms.meta["val"].shape
        return _in_float32_on_cpu(match) and len(shape) == 2 and part_length(shape[1], lanes()) < shape[1]

    def put_in_place(match: Match, terms: Any, keepdim: bool = False) -> None:
        reduce = _REDUCTIONS[match.output_node().target]
        length = part_length(terms.meta["val"].shape[1], lanes())
        match.replace_by_example(partial(_reduced_in_parts, reduce, length, keepdim), [terms])

    for operation in _REDUCTIONS:
        for keepdim in ((), (Arg(),)):
            pattern = CallFunction(operation, Arg(), [-1], *keepdim)
            register_graph_pattern(pattern, extra_check=is_long, pass_dict=patterns)(put_in_place)


def lanes() -> int:
    """Return how many float32 numbers the compiler puts into a vector on this processor."""
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    return max(4, pick_vec_isa().nelements())


def _reduced_in_parts(reduce: Callable[..., Tensor], length: int, keepdim: bool, terms: Tensor) -> Tensor:
    whole = terms.shape[-1] // length * length
    reduced = reduce(terms[:, :whole].unflatten(-1, (-1, length)), -1)
    if whole < terms.shape[-1]:
        reduced = torch.cat([reduced, reduce(terms[:, whole:], -1, keepdim=True)], -1)
    return reduce(reduced, -1, keepdim=keepdim)


def _in_float32_on_cpu(match: Any) -> bool:
    value = match.output_node().meta["val"]
    return bool(value.dtype == torch.float32 and value.device.type == "cpu")
