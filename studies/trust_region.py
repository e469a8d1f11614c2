"""Clip against penalty: how the ties to the old policy behave over learning rates and over their own settings.

GRPO on the embedded task ``prose`` (proxy reward, exact sequence anchor at a fixed β), four passes over every
step's responses, from one SFT model a seed: ratio clipping, KL penalty with fixed and with adapted β, both, masks by
measured divergence, and nothing. Shown are what is maximised (reward − β·KL to the reference, a response) at the end,
KL(old‖policy) of a step, clipped and masked shares, the penalty's β, gradient norms, and the worst step.

    make study-trust-region            # resumable: a run directory for each, under runs/study-trust-region
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from statistics import fmean, median
from typing import Any

from rich.console import Console
from rich.table import Table

from studies.figures import CYCLE, figure
from studies.runs import Row, Stage, rows, shipped, shown, train

HERE = Path(__file__).parent
RATES = (3e-4, 1e-3, 3e-3)
BETA, STEPS, EPOCHS = 0.3, 40, 4
TARGET = 0.01
"""Of the adapted penalties: KL(old‖policy) of a step, nats a token."""
REGIONS: dict[str, dict[str, Any]] = {
    "none": {"kind": "none"},
    "clip ε 0.1": {"kind": "clip", "low": 0.1, "high": 0.1},
    "clip ε 0.2": {"kind": "clip", "low": 0.2, "high": 0.2},
    "clip ε 0.3": {"kind": "clip", "low": 0.3, "high": 0.3},
    "penalty β 0.1": {"kind": "none", "penalty": {"beta": 0.1}},
    "penalty β 1": {"kind": "none", "penalty": {"beta": 1.0}},
    "penalty β 10": {"kind": "none", "penalty": {"beta": 10.0}},
    "penalty adapted, from β 0.1": {"kind": "none", "penalty": {"beta": 0.1, "target": TARGET}},
    "penalty adapted, from β 10": {"kind": "none", "penalty": {"beta": 10.0, "target": TARGET}},
    "clip ε 0.2 + penalty adapted": {
        "kind": "clip",
        "low": 0.2,
        "high": 0.2,
        "penalty": {"beta": 1.0, "target": TARGET},
    },
    "mask TV 0.1": {"kind": "none", "mask": {"measure": "tv", "threshold": 0.1}},
    "mask of responses, KL 0.05": {
        "kind": "none",
        "mask": {"measure": "kl", "threshold": 0.05, "level": "response"},
    },
}
REWARD, KL = "eval/reward/proxy", "eval/kl/policy_reference/exact_per_response"
OLD_KL, CLIPPED = "kl/old_policy/exact", ("trust_region/clip_fraction_low", "trust_region/clip_fraction_high")


def stage_name(region: str, rate: float) -> str:
    """Give the stage's name, in letters that a folder may have."""
    plain = (
        region.replace("ε", "eps").replace("β", "beta").replace(",", "").replace("+", "and").replace(" ", "-")
    )
    return f"{plain}-lr-{rate:g}"


def recipe() -> dict[str, Any]:
    """Give the recipe of a seed: its stages are regions at learning rates."""
    tree = shipped("prose")
    sft, policy = tree["stages"][0], tree["stages"][1]
    stages: list[Stage] = [sft]
    for region, settings in REGIONS.items():
        measured = {"penalty": {"beta": 0.0}} if "penalty" not in settings else {}
        for rate in RATES:
            stages.append(
                {
                    **policy,
                    "name": stage_name(region, rate),
                    "start": "sft",
                    "steps": STEPS,
                    "epochs": EPOCHS,
                    "advantage": {
                        "kind": "leave_one_out"
                    },  # of a group's standard deviation β would be weighed by it
                    "trust_region": {**settings, **measured},
                    "anchor": {
                        "gradient": "sequence",
                        "baseline": True,
                        "controller": {"kind": "fixed", "beta": BETA},
                    },
                    "optimizer": {"learning_rate": rate, "warmup_steps": 5, "max_gradient_norm": None},
                    "evaluation": {
                        "data": {"task": "prose", "split": "heldout", "count": 256},
                        "every": STEPS,
                    },
                    "checkpoint": {"every": STEPS},
                }
            )
    return {**tree, "name": "trust-region", "stages": stages}


def reached(row: Row) -> float:
    """Give what is maximised: reward − β·KL, a response."""
    return row[REWARD] - BETA * row[KL]


def summary(folder: Path, region: str, rate: float) -> Row:
    """Sum up a run."""
    stage = stage_name(region, rate)
    steps, looks = rows(folder, stage, OLD_KL), rows(folder, stage, REWARD)
    per_step = [row["kl/old_policy/exact_after_step"] for row in steps]
    return {
        "start": reached(looks[0]),
        "reached": reached(looks[-1]),
        "KL of a step": median(per_step),
        "largest": max(per_step),
        "clipped": fmean(sum(row[name] for name in CLIPPED) for row in steps),
        "masked": fmean(row.get("trust_region/masked_fraction", 0.0) for row in steps),
        "β": steps[-1]["trust_region/beta"],
        "gradient": median(row["gradient/norm"] for row in steps),
        "largest gradient": max(row["gradient/norm"] for row in steps),
    }


def show(found: dict[str, dict[float, list[Row]]]) -> list[dict[str, Any]]:
    """Print a line for each region and learning rate; give the lines."""
    columns = ("reached", "KL of a step", "largest", "clipped", "masked", "β", "gradient", "largest gradient")
    table = Table(box=None, title=f"reward − {BETA:g}·KL, and how it was had", title_justify="left")
    for column in ("region", "learning rate", *columns):
        table.add_column(column, justify="left" if column == "region" else "right")
    made = []
    for region, rates in found.items():
        for rate, runs in rates.items():
            cells = [shown(run["reached"] for run in runs)]
            cells += [f"{fmean(run[column] for run in runs):.3g}" for column in columns[1:]]
            table.add_row(region, f"{rate:g}", *cells)
            made.append({"region": region, "learning rate": rate, **dict(zip(columns, cells, strict=True))})
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    return made


def draw(found: dict[str, dict[float, list[Row]]], path: Path) -> None:
    """Draw what is reached, with KL(old‖policy) of a step beside it, over learning rates; a panel for each family."""
    families = {
        "clip": [name for name in found if name.startswith("clip ε") and "+" not in name],
        "penalty": [name for name in found if name.startswith("penalty")],
        "others": [name for name in found if name.startswith(("none", "mask")) or "+" in name],
    }
    means = [fmean(run["reached"] for run in runs) for each in found.values() for runs in each.values()]
    drawn = [-1.0, *filter(math.isfinite, means)]
    with figure(path, width=9.6, height=6.0, rows=2, columns=3) as plots:
        for column, (family, names) in enumerate(families.items()):
            above, below = plots[0][column], plots[1][column]
            for colour, name in zip(CYCLE, names, strict=False):
                for plot, key in ((above, "reached"), (below, "KL of a step")):
                    values = [fmean(run[key] for run in runs) for runs in found[name].values()]
                    plot.plot(list(found[name]), values, "o-", color=colour, ms=4, label=name)
            above.set_title(family, fontsize=9)
            above.set_ylim(max(min(drawn), -5.0) - 0.2, max(drawn) + 0.3)
            below.set(xlabel="learning rate", yscale="log", ylim=(1e-3, 0.5))
            below.axhline(TARGET, color="#7a7f87", lw=0.8, ls="--")
            below.legend(frameon=False, fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.24))
            for plot in (above, below):
                plot.set_xscale("log")
                plot.set_xticks(RATES, [f"{rate:g}" for rate in RATES], minor=False)
                plot.set_xticks([], minor=True)
        plots[0][0].set_ylabel(f"reward − {BETA:g}·KL at the end")
        plots[1][0].set_ylabel("KL(old‖policy) of a step, nats a token")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--runs", type=Path, default=Path("runs/study-trust-region"))
    parser.add_argument("--figure", type=Path, default=HERE.parent / "docs" / "images" / "trust-region.svg")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "trust-region.json")
    given = parser.parse_args()
    folders = [train(recipe(), given.runs / f"seed-{seed}", seed) for seed in range(given.seeds)]
    found = {
        region: {rate: [summary(folder, region, rate) for folder in folders] for rate in RATES}
        for region in REGIONS
    }
    table = show(found)
    draw(found, given.figure)
    start = fmean(run["start"] for run in found["none"][RATES[0]])
    spread = {
        family: {
            f"{rate:g}": _spread(
                [each[rate] for name, each in found.items() if name.startswith(family) and "+" not in name]
            )
            for rate in RATES
        }
        for family in ("clip ε", "penalty β", "penalty adapted")
    }
    record = {"start": start, "table": table, "range over settings": spread, "runs": found}
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return 0


def _spread(cells: list[list[Row]]) -> tuple[float, float]:
    """Give the worst and the best mean of what is reached."""
    means = [fmean(run["reached"] for run in runs) for runs in cells]
    return min(means, default=math.nan), max(means, default=math.nan)


if __name__ == "__main__":
    sys.exit(main())
