"""What the studies train is what they say, and their sums are right."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kedge.training import validate_recipe
from studies import overoptimisation, trust_region
from studies.runs import rows


@pytest.mark.parametrize("study", [overoptimisation, trust_region])
def test_the_recipe_is_valid_and_every_run_starts_from_the_same_model(study) -> None:
    recipe = validate_recipe(study.recipe())
    policies = [stage for stage in recipe.stages if stage.method == "grpo"]
    assert {stage.start for stage in policies} == {"sft"}
    names = [stage.name for stage in recipe.stages]
    assert len(set(names)) == len(names)


def test_the_ladders_differ_in_their_anchor_alone() -> None:
    recipe = validate_recipe(overoptimisation.recipe())
    policies = [stage for stage in recipe.stages if stage.method == "grpo"]
    plain = [stage.model_dump(exclude={"name", "anchor", "evaluation"}) for stage in policies]
    assert all(each == plain[0] for each in plain)
    controllers = [json.dumps(stage.anchor.controller.model_dump()) for stage in policies]
    assert len(set(controllers)) == len(controllers)


def test_the_regions_are_measured_alike() -> None:
    recipe = validate_recipe(trust_region.recipe())
    policies = [stage for stage in recipe.stages if stage.method == "grpo"]
    assert all(stage.trust_region.penalty is not None for stage in policies)
    assert len(policies) == len(trust_region.REGIONS) * len(trust_region.RATES)


def test_the_budget_is_chosen_on_the_first_seeds_alone() -> None:
    def run(gold: float) -> list[dict[str, float]]:
        return [{overoptimisation.GOLD: gold, "step": 80.0}]

    found = {name: [run(0.1)] * 3 for name in overoptimisation.anchors()}
    found["budget 0.2"] = [run(0.5), run(0.5), run(0.3)]
    found["budget 0.4"] = [run(0.4), run(0.4), run(0.9)]
    chosen = overoptimisation.chosen_budget(found)
    assert chosen["chosen on the first seeds"] == "budget 0.2"
    assert chosen["gold on the others"]["budget 0.2"] == "0.300"
    assert chosen["of the peak"] == pytest.approx(0.3 / 0.9)


def test_rows_are_those_with_the_key(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    lines = [{"step": 0, "eval/x": 1.0}, {"step": 1, "y": 2.0}]
    (tmp_path / "a" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert rows(tmp_path, "a", "eval/x") == [{"step": 0.0, "eval/x": 1.0}]
