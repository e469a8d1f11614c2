"""Scores of logits that a caller already holds, beside plain PyTorch, TRL and the memory's bandwidth.

Interleaved rounds in one process: forward alone, without a graph, and forward and backward together. The floor of
an operation is its traffic: logits read once in forward and once more in backward, their gradient written once.

    make bench-logits                  # Kedge and plain PyTorch
    PEERS=1 make bench-logits          # with TRL, in an environment of its own
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.head.inputs import DRIFT, LOGIT_STD
from benchmarks.head.machine import device_name, line, machine
from kedge.head import score_logits

RESULTS = Path(__file__).parent / "results"
SIZES = {"cpu": ["1024,32000", "256,151936"], "cuda": ["8192,151936", "16384,151936"]}
LOG_PROB, KL = "log-prob + entropy", "both KLs + entropy + log-prob"
WANT = {
    LOG_PROB: ("log_prob", "entropy"),
    KL: ("log_prob", "entropy", "reference.reverse_kl", "reference.forward_kl"),
}
FORWARD, BOTH = "forward", "forward + backward"
TRAFFIC = {(LOG_PROB, FORWARD): 1, (LOG_PROB, BOTH): 3, (KL, FORWARD): 2, (KL, BOTH): 5}
"""How often [N, V] must cross between memory and processor."""
GPU_SIZE = (16384, 151936)
GPU_GOALS = {(LOG_PROB, FORWARD): 1.8e-3, (LOG_PROB, BOTH): 5.5e-3, (KL, FORWARD): 3.7e-3, (KL, BOTH): 9.2e-3}
"""Seconds on an H100 at that size, in bf16."""
ROWS_CHECKED, MOST_ERROR = 8, {torch.float32: 1e-4, torch.bfloat16: 0.02}


@dataclass(frozen=True)
class Inputs:
    """Logits [N, V] of the policy and of a reference near it, tokens drawn evenly, an upstream gradient a score."""

    policy: Tensor
    reference: Tensor
    targets: Tensor
    upstream: Tensor  # [4, N]

    def first(self, rows: int, dtype: torch.dtype) -> Inputs:
        """Return the first rows in another dtype."""
        policy, reference = (
            each.detach()[:rows].to(dtype, copy=True) for each in (self.policy, self.reference)
        )
        return Inputs(
            policy.requires_grad_(), reference, self.targets[:rows], self.upstream[:, :rows].to(dtype)
        )


Scores = Callable[[Inputs], "tuple[Tensor, ...]"]


@dataclass
class Contender:
    """One way to make the scores of an operation, in the order of ``WANT``."""

    operation: str
    name: str
    scores: Scores
    seconds: dict[str, list[float]] = field(default_factory=lambda: {FORWARD: [], BOTH: []})
    failure: str | None = None
    error: float | None = None

    def run(self, inputs: Inputs, passes: str) -> Tensor | None:
        """Return the gradient of the logits, or nothing."""
        if passes == FORWARD:
            with torch.no_grad():
                self.scores(inputs)
            return None
        scores = self.scores(inputs)
        upstream = [pull.to(each.dtype) for pull, each in zip(inputs.upstream, scores, strict=False)]
        return torch.autograd.grad(scores, inputs.policy, upstream)[0]


def kedge_scores(operation: str, backend: str, inputs: Inputs) -> tuple[Tensor, ...]:
    anchors = {"reference": inputs.reference} if operation == KL else None
    want = WANT[operation]
    found = score_logits(inputs.policy, inputs.targets, anchors=anchors, want=want, backend=backend)
    return tuple(found[name] for name in WANT[operation])


def plain_scores(operation: str, plain: Callable[..., Any], inputs: Inputs) -> tuple[Tensor, ...]:
    """Make them as they are written on paper, in float32 at least."""
    found: tuple[Tensor, ...] = plain(operation, inputs.policy, inputs.reference, inputs.targets)
    return found


def _plain(operation: str, policy: Tensor, reference: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    log_p = _wide(policy).log_softmax(-1)
    p = log_p.exp()
    chosen = log_p.gather(-1, targets[:, None]).squeeze(-1)
    entropy = -(p * log_p).sum(-1)
    if operation == LOG_PROB:
        return chosen, entropy
    log_q = _wide(reference).log_softmax(-1)
    log_ratio = log_p - log_q
    return chosen, entropy, (p * log_ratio).sum(-1), -(log_q.exp() * log_ratio).sum(-1)


def trl_scores(inputs: Inputs) -> tuple[Tensor, ...]:
    from trl.trainer.utils import selective_log_softmax_and_entropy

    found: tuple[Tensor, Tensor] = selective_log_softmax_and_entropy(inputs.policy, inputs.targets)
    return found


def contenders(device: torch.device) -> Iterator[Contender]:
    for operation in WANT:
        for backend in ("triton",) if device.type == "cuda" else ("chunked", "compiled"):
            scores = partial(kedge_scores, operation, backend)
            yield Contender(operation, f"kedge score_logits {backend}", scores)
        yield Contender(operation, "dense", partial(plain_scores, operation, _plain))
        compiled = torch.compile(_plain, fullgraph=True)
        yield Contender(operation, "dense compiled", partial(plain_scores, operation, compiled))
    trl = Contender(LOG_PROB, "trl selective_log_softmax_and_entropy", trl_scores)
    if find_spec("trl") is None:
        trl.failure = "not installed; PEERS=1 make bench-logits installs it"
    yield trl


def make_inputs(rows: int, tokens: int, device: torch.device, dtype: torch.dtype) -> Inputs:
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, std: float) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=dtype).mul_(std)

    policy = normal(rows, tokens, std=LOGIT_STD)
    reference = normal(rows, tokens, std=DRIFT).add_(policy)
    targets = torch.randint(tokens, (rows,), generator=generator, device=device)
    upstream = torch.randn(4, rows, generator=generator, device=device)
    return Inputs(policy.requires_grad_(), reference, targets, upstream)


def measure(
    text: str, device: torch.device, dtype: torch.dtype, rounds: int, *, compiling: bool = True
) -> list[Contender]:
    """Time every contender in each of several rounds; one that fails or is wrong takes no part, and says why."""
    torch.compiler.reset()
    rows, tokens = (int(part) for part in text.split(","))
    inputs = make_inputs(rows, tokens, device, dtype)
    entrants = list(contenders(device))
    for each in entrants:
        if "compiled" in each.name and not compiling:
            each.failure = "left out by --no-compile"
        if each.failure is None:
            each.failure = _failure(each, inputs)
    for _ in range(rounds):
        for each in entrants:
            for passes, seconds in each.seconds.items():
                if each.failure is None:
                    run = partial(each.run, inputs, passes)
                    run()  # not timed: it pays for memory that others have let grow cold
                    seconds.append(_seconds(run, device))
    return entrants


def _failure(contender: Contender, inputs: Inputs) -> str | None:
    """Run it once at full size, so that it compiles, and once on a few rows, against float64."""
    few = inputs.first(ROWS_CHECKED, inputs.policy.dtype)
    try:
        for passes in (FORWARD, BOTH):
            contender.run(inputs, passes)
        found = contender.run(few, BOTH)
    except (RuntimeError, TypeError, ValueError, ImportError) as error:
        return f"fails: {type(error).__name__}: {str(error).strip().splitlines()[0][:120]}"
    exact = few.first(ROWS_CHECKED, torch.float64)
    paper = partial(plain_scores, contender.operation, _plain)
    truth = Contender(contender.operation, "", paper).run(exact, BOTH)
    assert found is not None
    assert truth is not None
    contender.error = float((found.double() - truth).norm() / truth.norm())
    wrong = not contender.error <= MOST_ERROR[inputs.policy.dtype]
    return f"its gradients are off by {contender.error:.0%}" if wrong else None


def _seconds(step: Callable[[], Any], device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    step()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _wide(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


def figures(text: str, entrants: list[Contender], dtype: torch.dtype) -> list[dict[str, Any]]:
    """Return a row for each contender and pass, with the goal where there is one."""
    rows, tokens = (int(part) for part in text.split(","))
    found = []
    for each in entrants:
        for passes, seconds in each.seconds.items():
            key = (each.operation, passes)
            middle = median(seconds) if seconds else None
            bytes_moved = TRAFFIC[key] * rows * tokens * dtype.itemsize
            judged = "kedge" in each.name and dtype == torch.bfloat16 and (rows, tokens) == GPU_SIZE
            found.append(
                {
                    "size": {"N": rows, "V": tokens},
                    "operation": each.operation,
                    "passes": passes,
                    "contender": each.name,
                    "seconds": middle,
                    "rounds": seconds,
                    "gigabytes_per_second": bytes_moved / middle / 1e9 if middle else None,
                    "gradient_error": each.error,
                    "absent": each.failure,
                    "goal": GPU_GOALS[key] if judged else None,
                }
            )
    return found


def falls_short(row: dict[str, Any]) -> bool:
    """Whether a row has a goal that it does not reach."""
    return row["goal"] is not None and (row["seconds"] is None or row["seconds"] > row["goal"])


def show(console: Console, rows: list[dict[str, Any]]) -> None:
    table = Table(title="scores of logits in hand", title_justify="left")
    for name in ("N,V", "operation", "passes", "contender"):
        table.add_column(name, overflow="fold")
    for name in ("median", "GB/s", "error", "goal"):
        table.add_column(name, justify="right")
    order = sorted(rows, key=lambda row: (*row["size"].values(), row["operation"], row["passes"]))
    for row in order:
        start = [f"{row['size']['N']},{row['size']['V']}", row["operation"], row["passes"], row["contender"]]
        if row["seconds"] is None:
            table.add_row(*start, "absent", row["absent"], style="dim")
            continue
        goal = "" if row["goal"] is None else f"{row['goal'] * 1e3:.1f} ms"
        verdict = "" if row["goal"] is None else " falls short" if falls_short(row) else " holds"
        middle, speed = f"{row['seconds'] * 1e3:.2f} ms", f"{row['gigabytes_per_second']:.1f}"
        table.add_row(*start, middle, speed, f"{row['gradient_error']:.0e}", goal + verdict)
    console.print(table)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.logits", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sizes", nargs="+", metavar="N,V", help="instead of the usual ones")
    parser.add_argument("--no-compile", action="store_true", help="leave out what uses torch's compiler")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, help="the JSON; benchmarks/results/logits-DEVICE.json else")
    given = parser.parse_args()
    device = torch.device(given.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    console = Console(width=None if sys.stdout.isatty() else 160)
    about = machine(device, "benchmarks.logits")
    console.print(line(about))
    rows: list[dict[str, Any]] = []
    for text in given.sizes or SIZES[device.type]:
        entrants = measure(text, device, dtype, given.rounds, compiling=not given.no_compile)
        rows += figures(text, entrants, dtype)
    show(console, rows)
    output = given.output or RESULTS / f"logits-{device_name(device)}.json"
    record = {"machine": about, "dtype": str(dtype).removeprefix("torch."), "rows": rows}
    output.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return int(any(falls_short(row) for row in rows))


if __name__ == "__main__":
    sys.exit(main())
