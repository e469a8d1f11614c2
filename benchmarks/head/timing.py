"""Rounds in which every contender has its turn, in one process, on the same inputs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache, partial
from statistics import median

import torch
from torch import Tensor

from benchmarks.head import plain
from benchmarks.head.contender import FLOOR, Absent, Contender, Step
from benchmarks.head.inputs import Inputs
from benchmarks.head.losses import CROSS_ENTROPY, EXACT

WARM_ROWS = (16, 48)
"""Two numbers of rows, so that a compiler knows that it varies."""

MOST_ERROR = {torch.float64: 1e-4, torch.float32: 1e-4, torch.bfloat16: 0.02}
"""Of gradients. In float32 a contender that leaves out the KL or the entropy is seen: each is 3e-4 of the whole."""
RETIRED_ABOVE = 1.25
FAILURES = (RuntimeError, TypeError, ValueError, AttributeError, ImportError, AssertionError)


@dataclass
class Entrant:
    """A contender that is ready to run.

    Args:
        error: the relative error of its gradients on a few rows (‖g − g*‖/‖g*‖, the larger of dh and dW, against
            whole logits in float64); None for the floor.
        trial: the seconds of one run before the rounds.
        seconds: of each round.
        retired: whether a faster setting of its family took part in the rounds instead.
    """

    contender: Contender
    step: Step
    error: float | None
    trial: float = 0.0
    seconds: list[float] = field(default_factory=list)
    retired: bool = False


def enter(
    contenders: Iterable[Contender | Absent], inputs: Inputs, say: Callable[[str], None]
) -> tuple[list[Entrant], list[Absent]]:
    """Build, warm and check every contender on a few rows; one that fails or is wrong is absent."""
    entrants, absent = [], []
    truth = cache(partial(_truth, inputs=inputs))
    for each in contenders:
        if isinstance(each, Absent):
            absent.append(each)
            continue
        say(f"warming {each.name}")
        try:
            error = warm(each, inputs, truth)
            step = each.build(inputs)
        except FAILURES as reason:
            absent.append(Absent(each.task, each.family, f"fails: {_first_line(reason)}"))
            continue
        if error is not None and not error <= MOST_ERROR[inputs.hidden.dtype]:
            absent.append(
                Absent(each.task, each.family, f"{each.setting}: its gradients are off by {error:.0%}")
            )
        else:
            entrants.append(Entrant(each, step, error))
    return entrants, absent


def warm(
    contender: Contender, inputs: Inputs, truth: Callable[[str], tuple[Tensor, ...]] | None = None
) -> float | None:
    """Run on a few rows, so that it compiles; return the error of its gradients, if the truth is given."""
    for rows in WARM_ROWS:
        few = inputs.first(rows)
        contender.build(few)()
        found = few.hidden.grad, few.weight.grad
        inputs.forget_gradients()
    if truth is None or contender.side == FLOOR:
        return None
    pairs = zip(found, truth(contender.task), strict=True)
    return max(float((each.float() - true).norm() / true.norm()) for each, true in pairs)


def _truth(task: str, inputs: Inputs) -> tuple[Tensor, ...]:
    few = inputs.first(WARM_ROWS[-1]).double()
    if task == EXACT:
        plain.exact_step(few, compiles=False)()
    elif task == CROSS_ENTROPY:
        plain.cross_entropy_step(few, compiles=False)()
    else:
        plain.sampled_step(task, few, selected=plain.by_log_softmax)()
    return few.hidden.grad.float(), few.weight.grad.float()


def try_whole(entrants: list[Entrant], inputs: Inputs, say: Callable[[str], None]) -> list[Absent]:
    """Run every contender once at its full size; take out, and return, those that fail there, as for want of memory."""
    absent = []
    for each in list(entrants):
        say(f"trying {each.contender.name}")
        try:
            each.trial = second_of_two(each.step, inputs)
        except FAILURES as reason:
            entrants.remove(each)
            what = f"{each.contender.setting or 'at its full size'}: fails: {_first_line(reason)}"
            absent.append(Absent(each.contender.task, each.contender.family, what))
            inputs.forget_gradients()
    return absent


def race(entrants: list[Entrant], inputs: Inputs, budget: float, say: Callable[[str], None]) -> None:
    """Time every contender in each of several rounds, A B C A B C …

    There are as many rounds as give a contender ``budget`` timed seconds on average, 5 at least, 50 at most.
    """
    for each in entrants:
        family = (each.contender.task, each.contender.family)
        fastest = min(o.trial for o in entrants if (o.contender.task, o.contender.family) == family)
        each.retired = each.trial > RETIRED_ABOVE * fastest and not each.contender.default
    racing = [each for each in entrants if not each.retired]
    rounds = int(budget * len(racing) / sum(each.trial for each in racing))
    rounds = max(5, min(50, rounds))
    for done in range(rounds):
        say(f"round {done + 1} of {rounds}")
        for each in racing:
            each.seconds.append(second_of_two(each.step, inputs))


def second_of_two(step: Step, inputs: Inputs) -> float:
    """Return the seconds of a run right behind another one.

    A page of memory that nobody has touched for a while costs several times more at the first touch on a virtual
    machine: whoever allocates whole matrices would pay for what others did in between, which was 5 to 18 % of the
    seconds of dense PyTorch, TRL and Liger. What is compiled for a size is compiled in the first run, too.
    """
    step()
    inputs.forget_gradients()
    return timed(step, inputs)


def timed(step: Step, inputs: Inputs) -> float:
    """Return the seconds of forward and backward together; gradients are dropped after the clock has stopped."""
    _wait(inputs)
    start = time.perf_counter()
    step()
    _wait(inputs)
    seconds = time.perf_counter() - start
    inputs.forget_gradients()
    return seconds


def ratio(one: list[float], other: list[float]) -> float:
    """Return the median over rounds of the ratio within a round, which a slow minute of the machine leaves alone."""
    return median(a / b for a, b in zip(one, other, strict=True))


def _wait(inputs: Inputs) -> None:
    if inputs.hidden.is_cuda:
        torch.cuda.synchronize()


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:150] if lines else ''}"
