"""Small recipes that train in seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

GRPO: dict[str, Any] = {
    "name": "grpo",
    "method": "grpo",
    "steps": 4,
    "data": {"task": "sums", "count": 64},
    "rewards": "DIGITS",
    "rollout": {
        "prompts_per_step": 4,
        "responses_per_prompt": 4,
        "max_new_tokens": 8,
        "truncated": "keep",
    },
    "anchor": {"controller": {"kind": "budget", "budget": 0.05}},
    "optimizer": {"learning_rate": 3e-3},
    "checkpoint": {"every": 2},
    "compute": {"micro_batch": 8},
    "evaluation": {"data": {"task": "sums", "split": "heldout", "count": 8}, "every": 2, "samples": 2},
}

PPO: dict[str, Any] = {
    **GRPO,
    "name": "ppo",
    "method": "ppo",
    "epochs": 2,
    "minibatches": 2,
    "anchor": {
        "measure": "k1",
        "placement": "reward",
        "gradient": "published",
        "controller": {"kind": "budget", "budget": 0.05},
    },
    "critic": {"optimizer": {"learning_rate": 3e-3}, "clip": 1.0},
}
"""The classic form: KL in the reward per token, a critic on its own backbone."""

SFT: dict[str, Any] = {
    "name": "sft",
    "method": "sft",
    "steps": 4,
    "data": {"task": "sums", "count": 64},
    "batch_size": 8,
    "optimizer": {"learning_rate": 3e-3},
    "checkpoint": {"every": 2},
    "evaluation": {"data": {"task": "sums", "split": "heldout", "count": 16}, "every": 2},
}

PROSE: dict[str, Any] = {
    "build": {"hidden_size": 32, "layers": 2, "heads": 2, "context": 96, "initializer_range": 0.06},
    "tokenizer": {"task": "prose"},
}

REWARD: dict[str, Any] = {
    "name": "scores",
    "method": "reward",
    "steps": 4,
    "data": {"task": "prose", "count": 64},
    "batch_size": 8,
    "true_preference": "kedge.tasks.prose:preference",
    "optimizer": {"learning_rate": 3e-3},
    "checkpoint": {"every": 2},
    "compute": {"micro_batch": 8},
    "evaluation": {"data": {"task": "prose", "split": "heldout", "count": 32}, "every": 2},
}

AGAINST_IT: dict[str, Any] = {
    **GRPO,
    "data": {"task": "prose", "count": 64},
    "rewards": {"functions": [{"model": "scores"}, {"function": "kedge.tasks.prose:gold", "weight": 0}]},
    "evaluation": {"data": {"task": "prose", "split": "heldout", "count": 8}, "every": 2, "samples": 2},
}

MODEL: dict[str, Any] = {
    "build": {"hidden_size": 32, "layers": 2, "heads": 2, "context": 48},
    "tokenizer": {"task": "sums"},
}


def short_reward(folder: Path) -> str:
    """Write a reward function that likes digits, so that groups differ; give its name."""
    file = folder / "digits.py"
    file.write_text(
        "def digits(prompts, completions, **columns):\n"
        "    return [float(sum(c.isdigit() for c in text)) for text in completions]\n",
        encoding="utf-8",
    )
    return f"{file}:digits"


def recipe(folder: Path, *stages: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A whole recipe in ``folder/run``; stages default to one of GRPO."""
    chosen = [dict(stage) for stage in stages] or [dict(GRPO)]
    for stage in chosen:
        if stage["method"] in ("grpo", "ppo") and stage.get("rewards") == "DIGITS":
            name = short_reward(folder)
            stage["rewards"] = {"functions": [{"function": name, "name": "digits"}]}
    return {"name": "test", "out": str(folder / "run"), "model": MODEL, "stages": chosen, **changes}


WALL_CLOCK = ("seconds/", "tokens_per_second", "memory_peak_bytes")


def without_clock(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Metrics without those that depend on the clock or the machine's memory."""
    return [{k: v for k, v in row.items() if not k.startswith(WALL_CLOCK)} for row in rows]
