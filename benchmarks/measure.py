"""`kedge measure` beside its parts and the straightforward script: seconds and peak memory on given texts.

Two models of one Llama shape are compared on the same texts, each contender in a process of its own, in turn:

* ``parts``: what cannot be saved: both models' passes to the hidden states, the bare products with both heads;
* ``kedge``: ``kedge.measure.compare``, whole: encoding, figures, intervals, noise floor and all;
* ``logits``: the script that one writes first: both models' logits of a batch, softmax, the same columns.

    make bench-measure

Memory is what a process takes beyond its loaded models. Exit status 1 where a goal falls short.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.head.machine import machine

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Shape:
    """What is compared, on how much text."""

    hidden_size: int
    layers: int
    heads: int
    intermediate: int
    vocabulary: int
    texts: int
    tokens: int
    batch: int


SHAPES = {
    "full": Shape(384, 8, 6, 768, 32_000, 64, 512, 8),
    "wide": Shape(384, 8, 6, 768, 64_000, 64, 512, 8),  # twice the vocabulary: what memory depends on
    "tiny": Shape(32, 2, 2, 64, 300, 8, 32, 4),  # a look at whether it runs
}
TIME_GOAL, SPEED_GOAL, MEMORY_GOAL = 1.3, 2.0, 0.25


def inputs(shape: Shape) -> tuple[Any, Any, Any, list[str]]:
    """Policy, a reference it has drifted from, their tokenizer, random texts."""
    import torch

    from kedge.models import build_model, frozen_copy
    from kedge.tasks.vocabulary import fixed_tokenizer

    words = [f"w{number}" for number in range(shape.vocabulary - 2)]
    tokenizer = fixed_tokenizer(words, unit="word", context=shape.tokens)
    reference = build_model(
        shape.vocabulary, hidden_size=shape.hidden_size, layers=shape.layers, heads=shape.heads,
        intermediate_size=shape.intermediate, context=shape.tokens, eos_id=1, pad_id=0, seed=0,
    )  # fmt: skip
    policy = frozen_copy(reference)
    generator = torch.Generator().manual_seed(1)
    for parameter in policy.parameters():
        parameter.add_(0.002 * torch.randn(parameter.shape, generator=generator))
    drawn = torch.randint(len(words), (shape.texts, shape.tokens), generator=generator).tolist()
    return policy, frozen_copy(reference), tokenizer, [" ".join(words[i] for i in row) for row in drawn]


def kedge_compare(shape: Shape, backend: str | None = None) -> Callable[[], dict[str, Any]]:
    from kedge.measure import compare

    policy, reference, tokenizer, texts = inputs(shape)

    def run() -> dict[str, Any]:
        found = compare(
            policy,
            reference,
            texts=texts,
            tokenizer=tokenizer,
            batch=shape.batch,
            device="cpu",
            backend=backend,
        )
        return {"reverse_kl": found["texts"]["reverse_kl"], "tokens": found["texts"].counts["tokens"]}

    return run


def parts_alone(shape: Shape) -> Callable[[], dict[str, Any]]:
    import torch

    from kedge.head import default_chunk_rows
    from kedge.head.products import multiply
    from kedge.models import hidden_states

    policy, reference, tokenizer, texts = inputs(shape)
    ids = torch.tensor([tokenizer(text)["input_ids"] for text in texts])

    @torch.no_grad()
    def run() -> dict[str, Any]:
        clock, rows = {"passes": 0.0, "products": 0.0}, default_chunk_rows(shape.vocabulary)
        room = torch.empty(rows, shape.vocabulary)
        for start in range(0, len(ids), shape.batch):
            batch = ids[start : start + shape.batch]
            lengths = torch.full((len(batch),), batch.shape[1])
            for model in (policy, reference):
                began = time.perf_counter()
                hidden = hidden_states(model, batch.flatten(), lengths)
                clock["passes"] += time.perf_counter() - began
                began = time.perf_counter()
                for first in range(0, len(hidden), rows):
                    chunk = hidden[first : first + rows]
                    multiply(chunk, model.lm_head.weight.T, room[: len(chunk)])
                clock["products"] += time.perf_counter() - began
        return clock

    return run


def whole_logits(shape: Shape) -> Callable[[], dict[str, Any]]:
    import torch

    policy, reference, tokenizer, texts = inputs(shape)
    ids = torch.tensor([tokenizer(text)["input_ids"] for text in texts])

    @torch.no_grad()
    def run() -> dict[str, Any]:
        columns: list[dict[str, torch.Tensor]] = []
        for start in range(0, len(ids), shape.batch):
            batch = ids[start : start + shape.batch]
            log_p = policy(input_ids=batch).logits[:, :-1].float().log_softmax(-1)
            log_q = reference(input_ids=batch).logits[:, :-1].float().log_softmax(-1)
            p, q, targets = log_p.exp(), log_q.exp(), batch[:, 1:, None]
            columns.append(
                {
                    "reverse_kl": (p * (log_p - log_q)).sum(-1),
                    "forward_kl": (q * (log_q - log_p)).sum(-1),
                    "policy_entropy": -(p * log_p).sum(-1),
                    "reference_entropy": -(q * log_q).sum(-1),
                    "policy_log_prob": log_p.gather(-1, targets),
                    "reference_log_prob": log_q.gather(-1, targets),
                    "same": log_p.argmax(-1) == log_q.argmax(-1),
                }
            )
        reverse = torch.cat([each["reverse_kl"].flatten() for each in columns])
        return {"reverse_kl": float(reverse.double().mean()), "tokens": len(reverse)}

    return run


CONTENDERS: dict[str, Callable[[Shape], Callable[[], dict[str, Any]]]] = {
    "parts": parts_alone,
    "kedge": kedge_compare,
    "kedge, chunked": lambda shape: kedge_compare(shape, "chunked"),
    "logits": whole_logits,
}


def resident() -> int:
    """Bytes that the process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def run_here(name: str, shape: Shape) -> None:
    """Print one run's seconds, memory beyond the models, and what it found, as JSON."""
    run = CONTENDERS[name](shape)
    before, peak, done = resident(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    began, cpu = time.perf_counter(), time.process_time()
    found = run()
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    done.set()
    watcher.join()
    print(json.dumps({"seconds": seconds, "cpu_seconds": cpu, "bytes": peak - before, **found}))


def measure(name: str, rounds: int) -> dict[str, Any]:
    """Run every contender in turn, as often as asked."""
    runs: dict[str, list[dict[str, Any]]] = {each: [] for each in CONTENDERS}
    for _ in range(rounds):
        for each in CONTENDERS:
            command = [sys.executable, "-m", "benchmarks.measure", "--one", each, "--shape", name]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            runs[each].append(json.loads(done.stdout.splitlines()[-1]))
    figures = {
        each: {
            **found[0],
            "seconds": statistics.median(run["seconds"] for run in found),
            "bytes": max(run["bytes"] for run in found),
        }
        for each, found in runs.items()
    }
    return {"shape": asdict(SHAPES[name]), "figures": figures, "verdicts": verdicts(figures)}


def verdicts(figures: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Kedge's shares, beside the goals."""
    kedge, parts, logits = (figures[name] for name in ("kedge", "parts", "logits"))
    shares = {
        "time over that of its parts": (kedge["seconds"] / parts["seconds"], TIME_GOAL),
        "time over that of whole logits": (kedge["seconds"] / logits["seconds"], 1 / SPEED_GOAL),
        "memory over that of whole logits": (kedge["bytes"] / logits["bytes"], MEMORY_GOAL),
    }
    return [
        {"what": what, "share": share, "goal": goal, "holds": share <= goal}
        for what, (share, goal) in shares.items()
    ]


def show(name: str, found: dict[str, Any]) -> None:
    print(f"shape {name}: {found['shape']}")
    for each, figures in found["figures"].items():
        rest = {key: value for key, value in figures.items() if key not in ("seconds", "bytes")}
        print(f"  {each:<16} {figures['seconds']:8.2f} s {figures['bytes'] / 1e6:8.0f} MB  {rest}")
    for verdict in found["verdicts"]:
        word = "holds" if verdict["holds"] else "FALLS SHORT"
        print(f"  {verdict['what']}: {verdict['share']:.2f}, goal {verdict['goal']:g}: {word}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, action="append", help="full if left out")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", choices=CONTENDERS, help="run this contender alone, in this process")
    given = parser.parse_args()
    shapes = given.shape or ["full"]
    if given.one:
        run_here(given.one, SHAPES[shapes[0]])
        return 0
    found = {name: measure(name, given.rounds) for name in shapes}
    import torch

    out = given.out or RESULTS / "measure-cpu.json"
    here = machine(torch.device("cpu"), "benchmarks.measure")
    out.write_text(json.dumps({"machine": here, **found}, indent=1) + "\n")
    for name, each in found.items():
        show(name, each)
    return int(any(not verdict["holds"] for each in found.values() for verdict in each["verdicts"]))


if __name__ == "__main__":
    sys.exit(main())
