"""The table of docs/prose.md: last evaluations over seeds, whether the budget was held, as Markdown and JSON.

for seed in 0 1 2 3 4; do kedge train prose-ladder seed=$seed out=runs/ladder-$seed; done
python benchmarks/prose_ladder.py runs/ladder-*
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path

from kedge.runs import read_config, read_metrics
from kedge.training.config import BudgetConfig

COLUMNS = {
    "proxy": "eval/reward/proxy",
    "gold": "eval/reward/gold",
    "grammatical": "eval/reward/grammatical",
    "KL a token": "eval/kl/policy_reference/exact",
    "KL a response": "eval/kl/policy_reference/exact_per_response",
    "entropy": "eval/entropy/policy",
    "perplexity under the reference": "eval/perplexity/reference",
}
RESULT = Path(__file__).parent / "results" / "prose-ladder.json"


def last_evaluation(stage: Path) -> dict[str, float]:
    row = read_metrics(stage)[-1]
    return {name: float(row[key]) for name, key in COLUMNS.items()}


def budget_held(stage: Path) -> dict[str, float] | None:
    """Mean KL of the last quarter and of the worst ten steps in it, as multiples of the budget."""
    rows = [row for row in read_metrics(stage) if row["step"] > 0]
    if "anchor/budget" not in rows[-1]:
        return None
    budget = float(rows[-1]["anchor/budget"])
    kl = [float(row["kl/policy_reference/exact"]) / budget for row in rows]
    last = kl[-len(kl) // 4 :]
    windows = [statistics.fmean(last[i : i + 10]) for i in range(len(last) - 9)]
    beta = float(rows[-1]["anchor/beta"])
    low = BudgetConfig(**read_config(stage)["anchor"]["controller"]).build().low
    return {
        "last quarter": statistics.fmean(last),
        "worst ten steps": max(windows),
        "β": beta,
        "β at its bound": float(beta <= 1.001 * low),
    }


def collect(runs: list[Path]) -> dict[str, list[dict[str, object]]]:
    found: dict[str, list[dict[str, object]]] = {}
    for run in runs:
        stages = [stage for stage in read_config(run, "recipe.yaml")["stages"] if stage["method"] == "grpo"]
        start = read_metrics(run / stages[0]["name"])[0]
        found.setdefault("SFT start", []).append({name: start[key] for name, key in COLUMNS.items()})
        for stage in stages:
            folder = run / stage["name"]
            entry: dict[str, object] = {**last_evaluation(folder), "budget": budget_held(folder)}
            found.setdefault(stage["name"], []).append(entry)
    return found


def shown(values: list[float]) -> str:
    spread = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    digits = 2 if abs(statistics.fmean(values)) >= 1 else 3
    return f"{statistics.fmean(values):.{digits}f} ± {spread:.{digits}f}"


def main() -> int:
    found = collect([Path(name) for name in sys.argv[1:]])
    print("| run | " + " | ".join(COLUMNS) + " |")
    print("|---" * (len(COLUMNS) + 1) + "|")
    for name, entries in found.items():
        cells = [shown([float(str(entry[column])) for entry in entries]) for column in COLUMNS]
        print(f"| {name} | " + " | ".join(cells) + " |")
    print()
    for name, entries in found.items():
        for seed, entry in enumerate(entries):
            if held := entry.get("budget"):
                print(f"{name}, run {seed}: {held}")
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
