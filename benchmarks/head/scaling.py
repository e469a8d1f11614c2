"""Cost and memory of exact KL over tokens and over the vocabulary, Kedge's and the dense definition's."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

import torch

from benchmarks.head.contender import Contender
from benchmarks.head.goals import Goal
from benchmarks.head.inputs import Inputs, Size, make_inputs
from benchmarks.head.memory import Peak, peak_in_a_process, peak_on_gpu
from benchmarks.head.timing import FAILURES, timed, warm
from kedge.head import default_chunk_rows
from kedge.head.projection import GATHERED, SLAB_ROWS

REPEATS = 7


@dataclass
class Point:
    contender: str
    along: str
    size: Size
    seconds: float
    peak: Peak | None

    def as_json(self) -> dict[str, Any]:
        return {**vars(self), "size": str(self.size)}


def sweep(
    along: str,
    sizes: list[Size],
    contenders_of: Callable[[Size], Iterable[Contender]],
    device: torch.device,
    dtype: torch.dtype,
    *,
    with_memory: bool,
    say: Callable[[str], None],
) -> Iterator[Point]:
    """Time every size of a sweep; a contender that fails at a size, for want of memory too, has no point there."""
    for size in sizes:
        torch.compiler.reset()
        inputs = make_inputs(size, device, dtype)
        contenders = list(contenders_of(size))
        seconds = {each.name: _seconds(each, inputs, say) for each in contenders}
        gpu = {
            each.name: peak_on_gpu(each.build(inputs), inputs)
            for each in contenders
            if with_memory and device.type == "cuda" and seconds[each.name] is not None
        }
        del inputs
        for each in contenders:
            found = seconds[each.name]
            if found is None:
                continue
            peak = gpu.get(each.name)
            if with_memory and device.type == "cpu":
                say(f"memory of {each.name} at {size}")
                peak = peak_in_a_process(each.name, size, torch.get_num_threads())
            yield Point(each.family, along, size, found, peak)


def _seconds(contender: Contender, inputs: Inputs, say: Callable[[str], None]) -> float | None:
    say(f"{contender.name} at {inputs.size}")
    try:
        warm(contender, inputs)
        step = contender.build(inputs)
        timed(step, inputs)
        return median(timed(step, inputs) for _ in range(REPEATS))
    except FAILURES:
        return None


def scaling_goals(
    points: list[Point], limits: dict[str, float | None], device: torch.device
) -> Iterator[Goal]:
    """Ask that time is proportional (the exponent is 1) and that memory is flat in N from a whole buffer on."""
    for along in ("N", "V"):
        mine = [point for point in points if point.along == along and "kedge" in point.contender]
        where = f"over {along}: " + ", ".join(str(_x(point)) for point in mine)
        slope = exponent([(_x(point), point.seconds) for point in mine]) if len(mine) > 1 else None
        figure = None if slope is None else abs(slope - 1)
        what = "time" if slope is None else f"time ∝ {along}^{slope:.3f}; distance of the exponent from 1"
        yield Goal("scaling/time", where, what, figure, limits.get("scaling/time"))
    what = "growth of incremental memory beyond dh, from a whole buffer to the most tokens"
    yield Goal("scaling/memory", "over N", what, _growth(points, device), limits.get("scaling/memory"))


def exponent(pairs: list[tuple[float, float]]) -> float:
    """Return b of the least-squares fit y = a·x^b.

    >>> round(exponent([(1.0, 3.0), (2.0, 12.0), (4.0, 48.0)]), 9)
    2.0
    """
    xs, ys = [math.log(x) for x, _ in pairs], [math.log(y) for _, y in pairs]
    x_mean, y_mean = fmean(xs), fmean(ys)
    covariance = sum((x - x_mean) * (y - y_mean) for x, y in zip(xs, ys, strict=True))
    return covariance / sum((x - x_mean) ** 2 for x in xs)


def _growth(points: list[Point], device: torch.device) -> float | None:
    """Return by what part of itself memory grew; the gradient of hidden states [N, H] is a result and may grow."""
    mine = [
        (point.size.rows, point.peak["incremental"] - 4 * point.size.rows * point.size.width)
        for point in points
        if point.along == "N"
        and "kedge" in point.contender
        and point.peak is not None
        and point.size.rows >= _whole_buffer(point.size, device)
    ]
    if len(mine) < 2:
        return None
    return mine[-1][1] / mine[0][1] - 1


def _whole_buffer(size: Size, device: torch.device) -> int:
    """Return from how many rows on as many gradients wait as ever do."""
    return SLAB_ROWS if device.type == "cuda" else GATHERED * default_chunk_rows(size.tokens)


def _x(point: Point) -> int:
    return point.size.rows if point.along == "N" else point.size.tokens
