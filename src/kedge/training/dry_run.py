"""``--dry-run``: the resolved recipe with the sizes that follow from it, nothing run."""

from __future__ import annotations

import json

import yaml
from rich.console import Console
from rich.table import Table

from kedge.training.config import (
    AnchorConfig,
    PpoStage,
    Recipe,
    RewardStage,
    SftStage,
    Stage,
    TrustRegionConfig,
)


def derived_sizes(stage: Stage) -> list[tuple[str, str]]:
    """Give the sizes that a stage's settings amount to, with units.

    >>> from kedge.training.recipe import parse_recipe
    >>> recipe = parse_recipe(\"\"\"
    ... name: example
    ... stages:
    ... - {name: sft, method: sft, steps: 10, batch_size: 32, data: {task: sums}, compute: {micro_batch: 8}}
    ... \"\"\")
    >>> derived_sizes(recipe.stages[0])[0]
    ('examples a step', '32 (in 4 micro-batches of up to 8)')
    """
    micro = stage.compute.micro_batch
    if isinstance(stage, SftStage):
        passes = -(-stage.batch_size // micro)
        return [
            ("examples a step", f"{stage.batch_size} (in {passes} micro-batches of up to {micro})"),
            ("examples in all", f"{stage.batch_size * stage.steps:,}"),
        ]
    if isinstance(stage, RewardStage):
        passes = -(-stage.batch_size // (micro // 2))
        return [
            ("pairs a step", f"{stage.batch_size} (in {passes} micro-batches of up to {micro // 2})"),
            ("pairs in all", f"{stage.batch_size * stage.steps:,}"),
        ]
    responses, rollout = stage.responses_per_step, stage.rollout
    update = responses // stage.minibatches
    sizes = [
        (
            "responses a step",
            f"{responses} ({rollout.prompts_per_step} prompts × {rollout.responses_per_prompt} responses)",
        ),
        (
            "updates a step",
            f"{stage.updates_per_step} ({stage.epochs} epochs × {stage.minibatches} minibatches)",
        ),
        ("responses an update", f"{update} (in {-(-update // micro)} micro-batches of up to {micro})"),
        ("tokens a step, at most", f"{responses * rollout.max_new_tokens:,} in responses"),
        ("responses in all", f"{responses * stage.steps:,}"),
        (
            "anchor",
            f"{_measure(stage.anchor)} in the {stage.anchor.placement}, gradient {stage.anchor.gradient}; "
            f"{stage.anchor.controller.in_words}",
        ),
        ("trust region", _trust_region(stage.trust_region, stage.updates_per_step)),
    ]
    return [*sizes, ("critic", _critic(stage))] if isinstance(stage, PpoStage) else sizes


def _measure(anchor: AnchorConfig) -> str:
    """Name the KL of an anchor."""
    return f"{anchor.measure} forward KL" if anchor.direction == "forward" else f"{anchor.measure} KL"


def _trust_region(region: TrustRegionConfig, updates: int) -> str:
    """Put in words what keeps a step small."""
    bounds = "" if region.kind == "none" else f" {1 - region.low:g} to {1 + region.high:g}"
    if updates == 1:
        return "none needed: one update a step, and the ratio is 1"
    parts = [f"ratio {region.kind}{bounds}" + (f", dual {region.dual:g}" if region.dual is not None else "")]
    if (penalty := region.penalty) is not None:
        hold = f" towards {penalty.target:g} nats/token a step" if penalty.target is not None else ""
        parts.append(f"penalty on exact KL(old‖policy), β {penalty.beta:g}{hold}")
    if (mask := region.mask) is not None:
        parts.append(f"{mask.level}s masked beyond {mask.form} {mask.measure} {mask.threshold:g}")
    return "; ".join(parts)


def _critic(stage: PpoStage) -> str:
    """Put in words what says the values, and what they are used for."""
    critic, gae = stage.critic, stage.advantage
    backbone = critic.model or ("the policy's own" if critic.shared else "a copy of the policy's")
    rate = "" if critic.shared else f", learning rate {critic.optimizer.learning_rate:g}"
    return f"backbone {backbone}{rate}; GAE with γ {gae.discount:g}, λ {gae.trace:g}"


def print_plan(recipe: Recipe) -> None:
    """Print the resolved recipe on standard output."""
    console = Console(highlight=False, soft_wrap=True)
    data = json.loads(json.dumps({**recipe.dump(), "out": recipe.directory}))
    console.print(yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=110), markup=False)
    table = Table(title="what this amounts to", title_justify="left", box=None, pad_edge=False)
    for name in ("stage", "what", "size"):
        table.add_column(name)
    for stage in recipe.stages:
        for index, (what, size) in enumerate([("steps", f"{stage.steps:,}"), *derived_sizes(stage)]):
            table.add_row(f"{stage.name} ({stage.method})" if index == 0 else "", what, size)
    console.print(table)
