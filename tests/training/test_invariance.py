"""How the same numbers are computed changes nothing: micro-batches, layout, chunks, order, prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import kedge
from kedge.objective import PolicyLoss
from kedge.runs import RunDirectory
from kedge.runs.interrupt import Interrupt
from kedge.training import PlainProgress, validate_recipe
from kedge.training.inputs import Materials, load_inputs
from kedge.training.loop import Session
from kedge.training.policy import PolicyWork
from kedge.training.resources import make_model, prepare_policy
from kedge.training.stages import policy_work
from tests.training.small import GRPO, MODEL, recipe

BASE: dict[str, Any] = {
    **GRPO,
    "steps": 3,
    "epochs": 2,
    "minibatches": 2,
    "evaluation": None,
    "entropy_bonus": 0.01,
    "compute": {"micro_batch": 8},
}

SAME: dict[str, dict[str, Any]] = {
    "one at a time": {"micro_batch": 1},
    "uneven parts": {"micro_batch": 3},
    "packed": {"layout": "packed"},
    "seven rows of logits": {"head_chunk_rows": 7},
    "activations recomputed": {"activation_checkpointing": True},
}

OBJECTIVES: dict[str, dict[str, Any]] = {
    "token": {},
    "sequence anchor with baseline": {
        "anchor": {"gradient": "sequence", "baseline": True, "controller": {"kind": "fixed", "beta": 0.3}}
    },
    "sequence ratio": {"trust_region": {"kind": "sequence"}, "aggregation": {"mode": "sequence_mean"}},
}


def weights(folder: Path, stage: dict[str, Any], dtype: str) -> dict[str, torch.Tensor]:
    folder.mkdir()
    run = kedge.train(recipe(folder, stage, model={**MODEL, "dtype": dtype})).stages["grpo"]
    return load_file(run.model / "model.safetensors")


@pytest.mark.filterwarnings("ignore:.*use_reentrant.*:UserWarning")
@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES.keys())
def test_float64(objective: dict[str, Any], tmp_path: Path) -> None:
    stage = {**BASE, **objective}
    expected = weights(tmp_path / "base", stage, "float64")
    for name, compute in SAME.items():
        found = weights(tmp_path / name, {**stage, "compute": {**stage["compute"], **compute}}, "float64")
        worst = max(float((found[key] - expected[key]).abs().max()) for key in expected)
        assert worst < 1e-10, f"{name}: {worst}"


def test_float32(tmp_path: Path) -> None:
    stage = {**BASE, "steps": 1, "optimizer": {"learning_rate": 1e-3, "eps": 1e-3}}
    expected = weights(tmp_path / "base", stage, "float32")
    for name, compute in SAME.items():
        found = weights(tmp_path / name, {**stage, "compute": {**stage["compute"], **compute}}, "float32")
        assert max(float((found[key] - expected[key]).abs().max()) for key in expected) < 1e-5


def test_a_setting_that_acts_is_seen(tmp_path: Path) -> None:
    """The comparison can fail: another aggregation gives other weights."""
    expected = weights(tmp_path / "base", BASE, "float64")
    found = weights(tmp_path / "other", {**BASE, "aggregation": {"mode": "sequence_mean"}}, "float64")
    assert max(float((found[key] - expected[key]).abs().max()) for key in expected) > 1e-6


@pytest.fixture
def work(tmp_path: Path) -> PolicyWork:
    """The work of one stage in float64, with a moved policy, so that no KL is zero."""
    config = recipe(tmp_path, BASE, model={**MODEL, "dtype": "float64"})
    made = validate_recipe(config)
    model, tokenizer = make_model(made.model, 0, torch.device("cpu"))
    prepare_policy(model, tokenizer)
    run = RunDirectory.create(tmp_path / "run", {}, resume=False)
    session = Session(made.stages[0], model, tokenizer, model.device, 0, run, PlainProgress(), Interrupt())
    inputs = load_inputs(made.stages[0], Materials(model, tokenizer, model.device, 0))
    found = policy_work(made.stages[0], session, inputs, None)
    assert isinstance(found, PolicyWork)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return found


def gradients(work: PolicyWork) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in work.session.model.parameters() if p.grad is not None])


def test_order_in_the_batch(work: PolicyWork) -> None:
    loss: PolicyLoss = work.loss()
    experience, _ = work.gatherer.gather(0, loss)
    count = len(experience.rollout.group)
    found = []
    for order in (torch.arange(count), torch.arange(count).flip(0)):
        work.session.model.zero_grad()
        work.accumulate(experience.select(order))
        found.append(gradients(work))
    assert float((found[0] - found[1]).abs().max()) < 1e-10
    assert float(found[0].abs().max()) > 1e-4


def test_prompt_tokens_never_contribute(work: PolicyWork, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hidden states inside the prompt get no gradient, those that predict a response token do."""
    experience, _ = work.gatherer.gather(0, work.loss())
    rollout = experience.rollout
    seen: list[torch.Tensor] = []
    import kedge.training.scoring as scoring

    real = scoring.hidden_states

    def kept(*args: Any, **options: Any) -> torch.Tensor:
        hidden: torch.Tensor = real(*args, **options)
        if hidden.requires_grad:
            hidden.retain_grad()
            seen.append(hidden)
        return hidden

    monkeypatch.setattr(scoring, "hidden_states", kept)
    work.accumulate(experience)
    gradient = torch.cat([hidden.grad for hidden in seen if hidden.grad is not None])
    touched = gradient.abs().sum(dim=1) > 0
    predicting = torch.zeros_like(touched)
    predicting[rollout.predicting()] = True
    assert not bool((touched & ~predicting).any())
    assert bool(touched[predicting].all())
