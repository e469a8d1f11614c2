"""A whole GRPO step beside TRL's, on one machine: rollout, reference, update; seconds a step and peak memory.

Both train the same Llama shape from the same prompts with the same group size, forced response lengths and
learning settings, each in a process of its own, in turn, several times over. TRL's KL is its sampled k3,
Kedge's the exact one. The first two steps, in which Kedge compiles its head, are left out for both.

    make bench-step                    # Kedge alone
    PEERS=1 make bench-step            # with TRL, in an environment of its own
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.head.machine import device_name, machine

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Shape:
    """What is trained, on what; and how much of TRL's time and memory a step may take."""

    hidden_size: int
    layers: int
    heads: int
    vocabulary: int
    prompts: int
    responses_per_prompt: int
    prompt_tokens: int
    response_tokens: int
    time_goal: float
    memory_goal: float | None
    steps: int


SHAPES = {
    "small": Shape(128, 4, 4, 45, 8, 8, 8, 32, 0.45, None, 20),
    "wide": Shape(256, 4, 4, 32_000, 8, 8, 8, 64, 0.3, 0.4, 4),
    "tiny": Shape(32, 2, 2, 45, 2, 4, 4, 8, 0.45, None, 4),  # a look at whether it runs
}
LEARNING_RATE, BETA, WARMED_UP = 1e-4, 0.04, 2


def tokenizer_of(vocabulary: int) -> Any:
    """Words w0, w1, …: as many as asked for, with padding and an end among them."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<end>", *(f"w{number}" for number in range(vocabulary - 2))]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="w0"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<end>")


def prompts_of(shape: Shape) -> list[str]:
    words = min(shape.vocabulary - 2, 40)
    return [
        " ".join(f"w{(7 * row + 3 * column) % words}" for column in range(shape.prompt_tokens))
        for row in range(64)
    ]


def even_words(completions: list[str], **_: Any) -> list[float]:
    """A reward that differs within a group."""
    words = [text.split() for text in completions]
    return [sum(int(word[1:]) % 2 == 0 for word in each) / max(1, len(each)) for each in words]


def model_of(shape: Shape) -> Any:
    from kedge.models import build_model

    return build_model(
        shape.vocabulary,
        hidden_size=shape.hidden_size,
        layers=shape.layers,
        heads=shape.heads,
        intermediate_size=3 * shape.hidden_size,
        context=shape.prompt_tokens + shape.response_tokens,
        pad_id=0,
        eos_id=1,
    )


def run_kedge(shape: Shape, folder: Path) -> list[float]:
    import functools

    import kedge
    from kedge.training import collect

    forced = functools.partial(collect.SamplingConfig, min_new_tokens=shape.response_tokens - 1)
    collect.SamplingConfig = forced  # no setting of a recipe: all responses have the full length
    data = folder / "prompts.jsonl"
    data.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts_of(shape)))

    def reward(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        return even_words(completions)

    stage = {
        "name": "grpo",
        "method": "grpo",
        "steps": shape.steps,
        "data": {"path": str(data)},
        "rollout": {
            "prompts_per_step": shape.prompts,
            "responses_per_prompt": shape.responses_per_prompt,
            "max_new_tokens": shape.response_tokens,
            "truncated": "keep",
        },
        "anchor": {"measure": "exact", "controller": {"kind": "fixed", "beta": BETA}},
        "optimizer": {"learning_rate": LEARNING_RATE},
        "checkpoint": {"every": 10_000},
        "compute": {
            "micro_batch": shape.prompts * shape.responses_per_prompt,
            "compile_head": shape.vocabulary > 1000,  # as runs of 80 steps and more choose themselves
        },
    }
    recipe = {"name": "bench", "out": str(folder / "run"), "stages": [stage]}
    result = kedge.train(
        recipe, model=model_of(shape), tokenizer=tokenizer_of(shape.vocabulary), rewards=[reward]
    )
    rows = [row for row in result.stages["grpo"].metrics if row["step"] > 0]
    assert all(row["length/mean"] == shape.response_tokens for row in rows)
    return [float(row["seconds/total"]) for row in rows]


def run_trl(shape: Shape, folder: Path) -> list[float]:
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.seconds: list[float] = []

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.started = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.seconds.append(time.perf_counter() - self.started)

    def reward(completions: list[str], **_: Any) -> list[float]:
        return even_words(completions)

    cpu = not torch.cuda.is_available()
    responses = shape.prompts * shape.responses_per_prompt
    settings = GRPOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=responses,
        num_generations=shape.responses_per_prompt,
        max_completion_length=shape.response_tokens,
        generation_kwargs={"min_new_tokens": shape.response_tokens},
        max_steps=shape.steps,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        beta=BETA,
        use_cpu=cpu,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        model_init_kwargs={"dtype": "float32"},
    )
    model_of(shape).save_pretrained(folder / "model")
    clock = Clock()
    trainer = GRPOTrainer(
        model=str(folder / "model"),  # a path: the reference is loaded from it once more
        processing_class=tokenizer_of(shape.vocabulary),
        reward_funcs=reward,
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts_of(shape)]),
        args=settings,
        callbacks=[clock],
    )
    trainer.train()
    return clock.seconds


RUNS = {"kedge": run_kedge, "trl": run_trl}


def run_here(name: str, shape: Shape) -> None:
    """Run one contender in this process and print what it took as JSON."""
    with tempfile.TemporaryDirectory() as folder:
        seconds = RUNS[name](shape, Path(folder))
    import torch

    cuda = torch.cuda.is_available()
    peak = (
        torch.cuda.max_memory_allocated()
        if cuda
        else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    )
    version = importlib.import_module(name).__version__
    print(json.dumps({"seconds": seconds[WARMED_UP:], "peak_bytes": peak, "version": version}))


def run_apart(name: str, shape: str) -> dict[str, Any]:
    """Run one contender in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.step", "--one", name, "--shape", shape]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    if done.returncode != 0:
        sys.exit(f"{name} failed:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def compare(name: str, rounds: int) -> dict[str, Any]:
    """Run the contenders in turn; median seconds of all their steps, largest peak."""
    contenders = [each for each in RUNS if each == "kedge" or importlib.util.find_spec(each)]
    runs: dict[str, list[dict[str, Any]]] = {each: [] for each in contenders}
    for _ in range(rounds):
        for each in contenders:
            runs[each].append(run_apart(each, name))
    figures = {
        each: {
            "seconds": statistics.median(second for run in found for second in run["seconds"]),
            "peak_bytes": max(run["peak_bytes"] for run in found),
            "version": found[0]["version"],
        }
        for each, found in runs.items()
    }
    return {"shape": asdict(SHAPES[name]), "figures": figures, "verdicts": verdicts(SHAPES[name], figures)}


def verdicts(shape: Shape, figures: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Kedge's share of TRL's time and memory, beside the goals."""
    if "trl" not in figures:
        return []
    share = {key: figures["kedge"][key] / figures["trl"][key] for key in ("seconds", "peak_bytes")}
    goals = {"seconds": shape.time_goal, "peak_bytes": shape.memory_goal}
    return [
        {"what": key, "share": share[key], "goal": goal, "holds": share[key] <= goal}
        for key, goal in goals.items()
        if goal is not None
    ]


def show(name: str, found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"a GRPO step, shape {name}", title_justify="left", box=None, pad_edge=False)
    for column in ("", "seconds", "peak memory, GB", "version"):
        table.add_column(column)
    for each, figures in found["figures"].items():
        peak = figures["peak_bytes"] / 1e9
        table.add_row(each, f"{figures['seconds']:.3f}", f"{peak:.2f}", figures["version"])
    console = Console()
    console.print(table)
    if "trl" not in found["figures"]:
        console.print("trl is not installed: nothing to compare with (PEERS=1 installs it)")
    for verdict in found["verdicts"]:
        word = "holds" if verdict["holds"] else "FALLS SHORT"
        console.print(f"{verdict['what']}: {verdict['share']:.2f} × TRL, goal {verdict['goal']:g}: {word}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, action="append", help="all but tiny if left out")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", choices=RUNS, help="run this contender alone, in this process")
    given = parser.parse_args()
    shapes = given.shape or ["small", "wide"]
    if given.one:
        run_here(given.one, SHAPES[shapes[0]])
        return 0
    found = {name: compare(name, given.rounds) for name in shapes}
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    out = given.out or RESULTS / f"step-{device_name(device)}.json"
    out.write_text(json.dumps({"machine": machine(device, "benchmarks.step"), **found}, indent=1) + "\n")
    for name, each in found.items():
        show(name, each)
    return int(any(not verdict["holds"] for each in found.values() for verdict in each["verdicts"]))


if __name__ == "__main__":
    sys.exit(main())
