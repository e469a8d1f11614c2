"""Every setting acts: what is learnt, or measured, is not what it is without it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

import kedge
from tests.training.small import GRPO, PPO, recipe, without_clock

REWARD = """
def begins_with_a_digit(prompts, completions, **columns):
    return [float(text[:1].isdigit()) for text in completions]
"""
"""Groups of equal rewards are frequent."""

FEW: dict[str, Any] = {"steps": 2, "epochs": 2, "minibatches": 2, "evaluation": None}
BASES: dict[str, dict[str, Any]] = {
    "grpo": {**GRPO, **FEW},
    "ppo": {**PPO, **FEW, "critic": {"shared": True, "coefficient": 0.1}},
}


def rollout(**changes: Any) -> dict[str, Any]:
    return {"rollout": {**GRPO["rollout"], **changes}}


def optimizer(**changes: Any) -> dict[str, Any]:
    return {"optimizer": {**GRPO["optimizer"], **changes}}


CHANGES: dict[str, tuple[str, dict[str, Any]]] = {
    "entropy bonus": ("grpo", {"entropy_bonus": 0.1}),
    "weights for the sampler": ("grpo", {"correction": {"kind": "truncate", "high": 0.5}}),
    "cut responses penalised": ("grpo", rollout(truncated="penalise", truncation_penalty=1.0)),
    "cut responses masked": ("grpo", rollout(truncated="mask")),
    "equal groups drawn again": ("grpo", rollout(resample_equal_groups=2)),
    "temperature": ("grpo", rollout(temperature=0.8)),
    "half precision": ("grpo", {"compute": {**GRPO["compute"], "precision": "bfloat16"}}),
    "dual clip": ("grpo", {"trust_region": {"dual": 1.001}}),
    "narrow clip": ("grpo", {"trust_region": {"low": 0.001, "high": 0.001}}),
    "no deviation": ("grpo", {"advantage": {"kind": "mean"}}),
    "another deviation": ("grpo", {"advantage": {"std": "population"}}),
    "decay": ("grpo", optimizer(weight_decay=0.5)),
    "eps": ("grpo", optimizer(eps=1e-2)),
    "betas": ("grpo", optimizer(betas=[0.5, 0.6])),
    "norm": ("grpo", optimizer(max_gradient_norm=1e-3)),
    "warm-up": ("grpo", optimizer(warmup_steps=2)),
    "schedule": ("grpo", optimizer(schedule="linear")),
    "another coefficient": ("ppo", {"critic": {"shared": True, "coefficient": 1.0}}),
    "short trace": ("ppo", {"advantage": {"trace": 0.5}}),
    "discount": ("ppo", {"advantage": {"discount": 0.9}}),
    "not whitened": ("ppo", {"advantage": {"whiten": False}}),
}


def trained(folder: Path, stage: dict[str, Any]) -> tuple[str, list[dict[str, Any]]]:
    """The hash of the weights after a run, and its metrics."""
    (folder / "reward.py").write_text(REWARD, encoding="utf-8")
    functions = [{"function": f"{folder / 'reward.py'}:begins_with_a_digit"}]
    run = kedge.train(recipe(folder, {**stage, "rewards": {"functions": functions}}))
    [result] = run.stages.values()
    weights = (result.path / "model" / "model.safetensors").read_bytes()
    return hashlib.sha256(weights).hexdigest(), without_clock(result.metrics)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {name: trained(tmp_path_factory.mktemp(name), stage)[0] for name, stage in BASES.items()}


@pytest.mark.parametrize(("base", "change"), CHANGES.values(), ids=CHANGES.keys())
def test_a_setting_of_training_moves_the_weights(
    base: str, change: dict[str, Any], bases: dict[str, str], tmp_path: Path
) -> None:
    assert trained(tmp_path, {**BASES[base], **change})[0] != bases[base]


def test_nothing_else_moves_them(bases: dict[str, str], tmp_path: Path) -> None:
    """Or the comparisons above would say nothing."""
    assert trained(tmp_path, BASES["grpo"])[0] == bases["grpo"]


@pytest.mark.parametrize("change", [{"temperature": 0.0}, {"responses_per_prompt": 2}], ids=str)
def test_a_setting_of_evaluation_moves_its_figures(change: dict[str, Any], tmp_path: Path) -> None:
    found = []
    for name, evaluation in (("plain", GRPO["evaluation"]), ("changed", {**GRPO["evaluation"], **change})):
        folder = tmp_path / name
        folder.mkdir()
        _, metrics = trained(folder, {**GRPO, "steps": 1, "evaluation": evaluation})
        found.append(metrics[0]["eval/entropy/policy"])
    assert found[0] != found[1]
