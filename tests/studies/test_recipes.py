"""What the studies train is what they say."""

from __future__ import annotations

import json

import pytest

from kedge.training import validate_recipe
from studies import overoptimisation, trust_region


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
