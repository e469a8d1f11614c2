"""Over-optimisation of a learned reward: proxy and gold against the distance from the reference.

From the recipe ``prose-rlhf-grpo``: SFT, a reward model trained on noisy preferences, then GRPO against it without an
anchor, for a ladder of β, and for a ladder of budgets, each from the same SFT model. The proxy is the reward
model's score, gold the grammar's own judgement; the distance is √KL(policy‖reference) of whole responses, as in
Gao, Schulman and Hilton, "Scaling Laws for Reward Model Overoptimization", 2022, arXiv 2210.10760.

    make study-overoptimisation        # resumable: a run directory for each, under runs/study-overoptimisation
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.table import Table

from studies.figures import CYCLE, figure
from studies.runs import Row, Stage, rows, shipped, shown, train

HERE = Path(__file__).parent
BETAS = (0.03, 0.1, 0.3, 1.0, 3.0)
BUDGETS = (0.05, 0.1, 0.2, 0.4, 0.8)
"""Nats a token."""
CHOSEN_ON, STEPS, LOOKS = 2, 80, 20
FREE = "no anchor"
PROXY, GOLD = "eval/reward/proxy", "eval/reward/gold"
KL = "eval/kl/policy_reference/exact_per_response"
LABELS = {PROXY: "proxy: the reward model, above SFT", GOLD: "gold: the grammar"}


def anchors() -> dict[str, dict[str, Any]]:
    """Give the anchor of each setting, by the setting's name."""
    exact = {"gradient": "sequence", "baseline": True}
    ladder = {f"β {beta:g}": {"kind": "fixed", "beta": beta} for beta in BETAS}
    ladder |= {f"budget {budget:g}": {"kind": "budget", "budget": budget} for budget in BUDGETS}
    found: dict[str, dict[str, Any]] = {FREE: {"controller": {"kind": "fixed", "beta": 0}}}
    return found | {name: {**exact, "controller": controller} for name, controller in ladder.items()}


def stage_name(setting: str) -> str:
    """Give the stage's name, in letters that a folder may have."""
    return setting.replace("β", "beta").replace(" ", "-")


def recipe() -> dict[str, Any]:
    """Give the recipe of a seed: its stages are the settings."""
    tree = shipped("prose-rlhf-grpo")
    sft, preferences, policy = (_named(tree, name) for name in ("sft", "preferences", "grpo"))
    stages: list[Stage] = [sft, preferences]
    for setting, anchor in anchors().items():
        every = STEPS // LOOKS if setting == FREE else STEPS
        evaluation = {"data": {"task": "prose", "split": "heldout", "count": 256}, "every": every}
        stages.append(
            {
                **policy,
                "name": stage_name(setting),
                "start": "sft",
                "steps": STEPS,
                "anchor": anchor,
                "evaluation": evaluation,
                "checkpoint": {"every": STEPS},
            }
        )
    return {**tree, "name": "overoptimisation", "stages": stages}


def _named(tree: dict[str, Any], name: str) -> Stage:
    stages = {stage["name"]: stage for stage in tree["stages"]}
    found: Stage = stages[name]
    return found


def distance(row: Row) -> float:
    """Give √KL of a response."""
    return math.sqrt(max(row[KL], 0.0))  # in this order NaN stays NaN


def collect(folders: list[Path]) -> dict[str, list[list[Row]]]:
    """Give the evaluations of each setting, a list a seed; the proxy counts from its value at the start.

    A reward model's scores are known up to a constant, which is another one for each seed.
    """
    found = {
        setting: [rows(folder, stage_name(setting), GOLD) for folder in folders] for setting in anchors()
    }
    starts = [run[0][PROXY] for run in found[FREE]]
    return {
        setting: [
            [{**row, PROXY: row[PROXY] - start} for row in run]
            for run, start in zip(runs, starts, strict=True)
        ]
        for setting, runs in found.items()
    }


def chosen_budget(found: dict[str, list[list[Row]]]) -> dict[str, Any]:
    """Choose the budget with the most gold on the first seeds; say what it earns on the others, beside the peak.

    The peak is the largest mean over the other seeds, of any budget: a largest value for each seed alone would be one
    of noise.
    """
    names = [f"budget {budget:g}" for budget in BUDGETS]

    def ends(name: str, seeds: slice) -> list[float]:
        return [run[-1][GOLD] for run in found[name][seeds]]

    best = max(names, key=lambda name: sum(ends(name, slice(CHOSEN_ON))))
    others = {name: ends(name, slice(CHOSEN_ON, None)) for name in names}
    return {
        "chosen on the first seeds": best,
        "gold on the others": {name: shown(golds, 3) for name, golds in others.items()},
        "of the peak": fmean(others[best]) / max(map(fmean, others.values())),
    }


def draw(found: dict[str, list[list[Row]]], path: Path) -> None:
    """Draw proxy above gold: over training without an anchor on the left, at the end of the ladders on the right."""
    ladders = {"β": (CYCLE[1], "ladder of β"), "budget": (CYCLE[0], "ladder of budgets")}
    with figure(path, width=7.6, height=5.4, rows=2, columns=2) as plots:
        for (left, right), (key, label) in zip(plots, LABELS.items(), strict=True):
            for run in found[FREE]:
                left.plot(
                    [distance(row) for row in run],
                    [row[key] for row in run],
                    "o-",
                    color=CYCLE[4],
                    ms=3,
                    lw=1,
                )
            for kind, (colour, name) in ladders.items():
                ends = [
                    [run[-1] for run in runs] for setting, runs in found.items() if setting.startswith(kind)
                ]
                means = sorted((fmean(map(distance, end)), fmean(row[key] for row in end)) for end in ends)
                right.plot(*zip(*means, strict=True), "o-", color=colour, ms=4, label=name)
                each = [(distance(row), row[key]) for end in ends for row in end]
                right.plot(*zip(*each, strict=True), "o", color=colour, ms=2, alpha=0.4)
            for plot in (left, right):
                plot.set(xlabel="√KL(policy‖reference) of a response", ylabel=label, xlim=(0, None))
        plots[0][0].set_title("no anchor, over training", fontsize=9)
        plots[0][1].set_title("with an anchor, at the end", fontsize=9)
        plots[0][1].legend(frameon=False)


def show(found: dict[str, list[list[Row]]]) -> list[dict[str, str]]:
    """Print the table; give its rows."""
    starts = [run[0] for run in found[FREE]]
    ends = {"SFT": starts, **{setting: [run[-1] for run in runs] for setting, runs in found.items()}}
    peaks = [max(run, key=lambda row: (not math.isnan(row[GOLD]), row[GOLD])) for run in found[FREE]]
    ends["no anchor, at its most gold"] = peaks
    table = Table(box=None, title="proxy and gold by distance", title_justify="left")
    columns = {"√KL": distance, "proxy": lambda row: row[PROXY], "gold": lambda row: row[GOLD]}
    for column in ("setting", *columns, "grammatical"):
        table.add_column(column, justify="left" if column == "setting" else "right")
    made = []
    for setting, at in ends.items():
        cells = [shown(of(row) for row in at) for of in columns.values()]
        cells.append(shown(row["eval/reward/grammatical"] for row in at))
        table.add_row(setting, *cells)
        made.append(dict(zip(("setting", *columns, "grammatical"), (setting, *cells), strict=True)))
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    return made


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--runs", type=Path, default=Path("runs/study-overoptimisation"))
    parser.add_argument(
        "--figure", type=Path, default=HERE.parent / "docs" / "images" / "overoptimisation.svg"
    )
    parser.add_argument("--out", type=Path, default=HERE / "results" / "overoptimisation.json")
    given = parser.parse_args()
    folders = [train(recipe(), given.runs / f"seed-{seed}", seed) for seed in range(given.seeds)]
    found = collect(folders)
    table = show(found)
    budget = chosen_budget(found) if given.seeds > CHOSEN_ON else None
    print(json.dumps(budget, indent=1, ensure_ascii=False))
    draw(found, given.figure)
    kept = {
        setting: [[{key: row[key] for key in ("step", PROXY, GOLD, KL)} for row in run] for run in runs]
        for setting, runs in found.items()
    }
    record = {"table": table, "budget": budget, "evaluations": kept}
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
