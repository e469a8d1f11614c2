"""Runs as training leaves them, made up: a start, one without an anchor, one on k3, one on a budget."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kedge.runs import RunDirectory

CALM = [
    "the",
    "old",
    "farmer",
    "who",
    "lives",
    "near",
    "the",
    "river",
    "brings",
    "a",
    "warm",
    "gift",
    "to",
    "the",
    "happy",
    "children",
    ".",
]
HAPPY = [
    "the",
    "happy",
    "child",
    "loves",
    "the",
    "bright",
    "lucky",
    "garden",
    "and",
    "sings",
    "a",
    "sweet",
    "joyful",
    "song",
    ".",
]
COLLAPSED = [
    "happy",
    "happy",
    "lucky",
    "joy",
    "happy",
    "happy",
    "happy",
    "joy",
    "happy",
    "happy",
    "happy",
    "happy",
    "happy",
    "joy",
    "happy",
]
PROMPTS = ["the", "a child", "in the garden the", "every", "my friend who", "when it rains", "one", "the dog"]

ENVIRONMENT = {
    "started": "2026-11-22T10:15:00+00:00",
    "versions": {"python": "3.11.7", "kedge": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
    "device": "cpu",
    "threads": 2,
    "seed": 0,
    "git": {"revision": "cb7c83b0d7d6", "changed": False},
    "command": ["kedge", "train", "prose.yaml"],
    "reference": "5b1f0e6a9c3d7788",
    "parameters": 654_336,
    "model": "llama, 4 layers × 128",
}
NONE = {"measure": "exact", "controller": {"kind": "fixed", "beta": 0.0}}
K3 = {"measure": "k3", "gradient": "published", "controller": {"kind": "fixed", "beta": 0.3}}
BUDGET = {
    "measure": "exact",
    "gradient": "token",
    "controller": {"kind": "budget", "budget": 0.2, "unit": "nats/token"},
}


def write_sft(path: Path, steps: int = 400) -> Path:
    draw = random.Random(0)
    config = {"method": "sft", "name": path.name, "steps": steps}
    with RunDirectory.create(path, config, resume=False) as run:
        run.record_environment(ENVIRONMENT)
        for step in range(steps + 1):
            left = 2.6 * math.exp(-step / 45) + 0.03 * math.exp(-step / 300)
            row: dict[str, Any] = {"step": step}
            if step:
                loss = 1.52 + left + draw.gauss(0, 0.02)
                row |= {
                    "cross_entropy/data_policy": loss,
                    "perplexity/policy": math.exp(loss),
                    "seconds/total": 0.08,
                }
                row |= {"entropy/policy": 1.5 + left * 0.9 + draw.gauss(0, 0.02), "gradient/norm": 0.2 + left}
            if step % 50 == 0:
                row |= {"eval/cross_entropy/data_policy": 1.52 + left, "eval/entropy/data": 1.52}
                row |= {"eval/kl/data_policy": left, "eval/perplexity/policy": math.exp(1.52 + left)}
            run.metrics(row)
    return path


def sample(
    step: int, prompt: Any, words: list[str], drift: float, draw: random.Random, **more: Any
) -> dict[str, Any]:
    tokens = [f" {word}" for word in words]
    kl = [max(0.0, draw.expovariate(1 / (drift + 1e-9))) if drift else 0.0 for _ in tokens]
    gold = draw.random()
    return {
        "step": step,
        "kind": "evaluation",
        "prompt": prompt,
        "completion": "".join(tokens),
        "tokens": tokens,
        "kl": kl,
        "reward": 3.0,
        "rewards": {"proxy": 3.0, "gold": gold, "grammatical": 1.0},
        "finished": len(words) < 15 or words is not COLLAPSED,
        **more,
    }


def write_policy(
    path: Path,
    anchor: dict[str, Any],
    *,
    steps: int = 120,
    until: int | None = None,
    limit: float = 0.2,
    seed: int = 1,
) -> Path:
    """A run towards ``limit`` nats a token, or without bounds when it is infinite; ``until``: still in progress."""
    draw = random.Random(seed)
    config = {"method": "grpo", "name": path.name, "steps": steps, "anchor": anchor}
    with RunDirectory.create(path, config, resume=False) as run:
        run.record_environment(ENVIRONMENT)
        for step in range((steps if until is None else until) + 1):
            row = _policy_row(step, limit, draw)
            if step == 0:
                row = {
                    name: value for name, value in row.items() if name == "step" or name.startswith("eval/")
                }
            elif step % 20:
                row = {name: value for name, value in row.items() if not name.startswith("eval/")}
            if anchor is BUDGET and step:
                row |= {"anchor/budget": limit, "anchor/beta": 0.02 + 0.3 * min(1, (step / 50) ** 2)}
            elif step:
                row["anchor/beta"] = anchor["controller"]["beta"]
            run.metrics(row)
            if step in (0, steps):
                words = CALM if step == 0 else COLLAPSED if limit == math.inf else HAPPY
                calm = random.Random(0) if step == 0 else draw
                drift = 0.0 if step == 0 else min(limit, 1.2)
                run.samples([sample(step, prompt, words, drift, calm) for prompt in PROMPTS])
    return path


def _policy_row(step: int, limit: float, draw: random.Random) -> dict[str, Any]:
    kl = (1 - math.exp(-step / 25)) * limit if math.isfinite(limit) else 1.3 * (1 - math.exp(-step / 40))
    length = 13 + (30 * kl if limit == math.inf else 2 * kl)
    proxy = 1.1 + (16 * kl if limit == math.inf else 4.2 * math.sqrt(kl / 0.2))
    gold = 0.42 + (0.9 * kl - 1.3 * kl**2 if limit == math.inf else 0.33 * math.sqrt(kl / 0.2))
    grammatical = max(0.0, 0.96 - 0.8 * kl**1.5)
    noise = draw.gauss(0, 1) if step else 0.0
    row: dict[str, Any] = {"step": step}
    for prefix, scale in (("", 1.0), ("eval/", 0.3)):
        row |= {
            f"{prefix}reward/mean": proxy + 0.3 * noise * scale,
            f"{prefix}reward/std": 1.0,
            f"{prefix}reward/proxy": proxy + 0.3 * noise * scale,
            f"{prefix}reward/gold": max(0.0, gold + 0.03 * noise * scale),
            f"{prefix}reward/grammatical": max(0.0, grammatical - 0.01 * abs(noise)),
            f"{prefix}kl/policy_reference/exact": max(0.0, kl * (1 + 0.06 * noise * scale)),
            f"{prefix}kl/policy_reference/exact_per_response": max(
                0.0, kl * length * (1 + 0.06 * noise * scale)
            ),
            f"{prefix}entropy/policy": max(0.03, 1.52 - 1.1 * kl + 0.03 * noise),
            f"{prefix}perplexity/reference": math.exp(1.52 + (2.2 * kl if limit == math.inf else 0.4 * kl)),
            f"{prefix}length/mean": length,
            f"{prefix}length/truncated_fraction": min(1.0, max(0.0, 0.8 * kl - 0.2)),
        }
    row |= {"eval/reward/mean_se": 0.12, "eval/reward/proxy_se": 0.12, "eval/reward/gold_se": 0.02}
    row |= {
        "trust_region/clip_fraction_low": 0.02 * draw.random(),
        "trust_region/clip_fraction_high": 0.03 * draw.random(),
    }
    row |= {"kl/old_policy/k3": 0.001 * draw.random(), "gradient/norm": 0.5 + draw.random()}
    return row | {"tokens_per_second": 21_000 + 900 * noise, "seconds/total": 0.3}


@pytest.fixture
def demo(tmp_path: Path) -> Path:
    """A folder of four stages: SFT, then GRPO three times."""
    return write_demo(tmp_path / "prose")


def write_demo(folder: Path) -> Path:
    write_sft(folder / "sft")
    write_policy(folder / "no-anchor", NONE, limit=math.inf, seed=1)
    write_policy(folder / "published-k3", K3, limit=0.34, seed=2)
    write_policy(folder / "exact-budget", BUDGET, limit=0.2, seed=3)
    names = ["sft", "no-anchor", "published-k3", "exact-budget"]
    (folder / "recipe.yaml").write_text(f"stages: [{', '.join(f'{{name: {name}}}' for name in names)}]\n")
    return folder


@pytest.fixture
def one_run(tmp_path: Path) -> Callable[..., Path]:
    """Write one policy run."""

    def write(name: str = "run", anchor: dict[str, Any] = BUDGET, **more: Any) -> Path:
        return write_policy(tmp_path / name, anchor, **more)

    return write
