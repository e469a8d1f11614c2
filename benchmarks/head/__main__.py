"""The benchmark's command: ``python -m benchmarks.head``. Exit status 1 where a goal falls short."""

from __future__ import annotations

import argparse
import gc
import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.head.contender import FLOOR, Absent, Contender
from benchmarks.head.goals import LIMITS, Goal, goals_of, taken
from benchmarks.head.inputs import DRIFT, LOGIT_STD, RESPONSES, Size, make_inputs
from benchmarks.head.kedge_side import REDUCE, fast_backend, kedge_contenders
from benchmarks.head.losses import BETA, CLIP, ENTROPY_BONUS, EXACT
from benchmarks.head.machine import device_name, line, machine
from benchmarks.head.memory import peak_in_a_process, peak_of_this_process, peak_on_gpu
from benchmarks.head.peers import peer_contenders
from benchmarks.head.plain import DENSE, plain_contenders
from benchmarks.head.products import floor_contenders
from benchmarks.head.results import Result, Row
from benchmarks.head.scaling import Point, scaling_goals, sweep
from benchmarks.head.tables import show_goals, show_result, show_sweeps
from benchmarks.head.timing import enter, race, try_whole

RESULTS = Path(__file__).parents[1] / "results"
SIZES = {
    "cpu": ["2048,512,32000", "1024,1024,65536", "1024,896,151936"],
    "cuda": ["16384,2048,151936", "16384,4096,151936"],
    "quick": ["64,32,500"],
}
SWEEPS = {
    "cpu": {
        "N": [f"{rows},512,32000" for rows in (512, 1024, 2048, 4096)],
        "V": [f"1024,512,{tokens}" for tokens in (16000, 32000, 64000, 128000)],
    },
    "cuda": {
        "N": [f"{rows},2048,151936" for rows in (2048, 4096, 8192, 16384)],
        "V": [f"8192,2048,{tokens}" for tokens in (32000, 64000, 128000, 256000)],
    },
    "quick": {"N": ["64,32,500", "128,32,500"], "V": ["64,32,500", "64,32,1000"]},
}
NO_COMPILER = "left out by --no-compile"

console = Console(width=None if sys.stdout.isatty() else 180)


def say(text: str) -> None:
    """Tell on standard error what is being done; on a terminal the next line takes this one's place."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[2K{text[:100]}")
    else:
        sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def main() -> int:
    options = read_options()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")  # of compilers and peers; failures are reported as such
    if options.memory:
        print(json.dumps(_memory_alone(options)))
        return 0
    device = torch.device(options.device)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # whose clock and memory are meant
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    limits: dict[str, float | None] = dict.fromkeys(LIMITS) if options.quick else dict(LIMITS)
    limits |= options.goal
    record: dict[str, Any] = {"machine": machine(device), "settings": _settings(options, dtype), "sizes": []}
    console.print(line(record["machine"]))
    goals: list[Goal] = []
    for text in options.sizes:
        result = measure(Size.read(text), device, dtype, options)
        show_result(console, result)
        goals += goals_of(result, limits)
        record["sizes"].append(result.as_json())
        _write(options.output, record, goals)
    points = [] if options.no_scaling else _sweeps(options, device, dtype)
    show_sweeps(console, points)
    goals += scaling_goals(points, limits, device) if points else []
    record["scaling"] = [point.as_json() for point in points]
    show_goals(console, goals)
    _write(options.output, record, goals)
    return int(any(goal.verdict == "fall short" for goal in goals))


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.head", description=__doc__)
    add = parser.add_argument
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--threads", type=int, default=torch.get_num_threads(), help="for every contender alike")
    add("--sizes", nargs="+", metavar="N,H,V", help="instead of the usual ones")
    add(
        "--budget",
        type=float,
        default=30.0,
        help="timed seconds of a contender at a size, 5 rounds at least; twice that passes",
    )
    add("--quick", action="store_true", help="tiny sizes; no goal but those given; no file but the one given")
    add("--only", nargs="+", default=[""], metavar="PART", help="of contenders whose names hold one of these")
    add("--no-compile", action="store_true", help="leave out what uses torch's compiler")
    add("--no-scaling", action="store_true", help="leave out the sweeps over N and V")
    add("--no-memory", action="store_true", help="leave out the peaks of memory")
    add("--goal", nargs="+", type=_goal, default=[], metavar="NAME=LIMIT", help=", ".join(LIMITS))
    add("--output", type=Path, help="the JSON; benchmarks/results/head-DEVICE.json if not given")
    add("--memory", metavar="CONTENDER", help="only print the peak of one contender on a CPU")
    options = parser.parse_args()
    kind = "quick" if options.quick else torch.device(options.device).type
    options.sizes, options.sweeps = options.sizes or SIZES[kind], SWEEPS[kind]
    if options.output is None and not options.quick:
        options.output = RESULTS / f"head-{device_name(torch.device(options.device))}.json"
    options.goal = dict(options.goal)
    if options.quick:
        options.budget = 0.0
    return options


def contenders(size: Size, options: argparse.Namespace) -> Iterator[Contender | Absent]:
    device = torch.device(options.device)
    for each in (
        *floor_contenders(size, device),
        *kedge_contenders(size, device),
        *plain_contenders(size, device),
        *peer_contenders(size, device),
    ):
        if isinstance(each, Contender) and not any(part in each.name for part in options.only):
            continue
        if options.no_compile and isinstance(each, Contender) and each.compiles:
            yield Absent(each.task, each.family, NO_COMPILER)
        else:
            yield each


def measure(size: Size, device: torch.device, dtype: torch.dtype, options: argparse.Namespace) -> Result:
    """Time every contender at one size, then take the peaks of those that took part in the rounds."""
    torch.compiler.reset()
    inputs = make_inputs(size, device, dtype)
    entrants, absent = enter(contenders(size, options), inputs, say)
    absent += try_whole(entrants, inputs, say)
    race(entrants, inputs, options.budget, say)
    result = Result(size, dtype.itemsize, [Row.of(each) for each in entrants], list(dict.fromkeys(absent)))
    if device.type == "cuda" and not options.no_memory:
        for row, entrant in zip(result.rows, entrants, strict=True):
            row.peak = peak_on_gpu(entrant.step, inputs)
    del entrants, inputs
    gc.collect()
    if device.type == "cpu" and not options.no_memory:
        for row in _rows_with_memory(result, options):
            say(f"memory of {row.contender.name}")
            row.peak = peak_in_a_process(row.contender.name, size, options.threads)
    return result


def _rows_with_memory(result: Result, options: argparse.Namespace) -> Iterator[Row]:
    """Each family's fastest setting and its default; for a quick run two that a goal compares."""
    backend = taken(result)
    for row in result.rows:
        each = row.contender
        if options.quick:
            compared = (DENSE, f"{REDUCE} {backend}")
            if each.task == EXACT and each.family in compared and not row.retired:
                yield row
        elif each.default or row is result.fastest(each.task, each.family):
            yield row


def _memory_alone(options: argparse.Namespace) -> Any:
    size = Size.read(options.sizes[0])
    for each in contenders(size, options):
        if isinstance(each, Contender) and each.name == options.memory:
            return peak_of_this_process(each, size)
    raise SystemExit(f"no contender is called {options.memory!r}")


def _sweeps(options: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> list[Point]:
    fast = fast_backend(device)
    backend = "chunked" if options.no_compile and fast == "compiled" else fast

    def contenders_of(size: Size) -> list[Contender]:
        found = [each for each in contenders(size, options) if isinstance(each, Contender)]
        chosen = [each for each in found if each.task == EXACT and each.side != FLOOR]
        own = [each for each in chosen if each.family == f"{REDUCE} {backend}" and each.default]
        return own + [each for each in chosen if each.family == DENSE]

    with_memory = not (options.quick or options.no_memory)
    points: list[Point] = []
    for along, texts in options.sweeps.items():
        sizes = [Size.read(text) for text in texts]
        points += sweep(along, sizes, contenders_of, device, dtype, with_memory=with_memory, say=say)
    return points


def _settings(options: argparse.Namespace, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "logit_std": LOGIT_STD,
        "drift": DRIFT,
        "responses": RESPONSES,
        "beta": BETA,
        "clip": CLIP,
        "entropy_bonus": ENTROPY_BONUS,
        "budget_seconds": options.budget,
        "goals_changed": options.goal,
        "trained": "hidden states and weight; the reference has hidden states and a weight of its own",
    }


def _goal(text: str) -> tuple[str, float]:
    name, _, limit = text.partition("=")
    if name not in LIMITS:
        raise argparse.ArgumentTypeError(f"{name!r} is no goal; there are: {', '.join(LIMITS)}")
    return name, float(limit)


def _write(path: Path | None, record: dict[str, Any], goals: list[Goal]) -> None:
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    written = {**record, "goals": [goal.as_json() for goal in goals]}
    path.write_text(json.dumps(written, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
