"""How the same numbers are computed changes nothing: micro-batches, layout, chunks, order, prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import kedge
from kedge.runs import RunDirectory, load_state
from kedge.runs.interrupt import Interrupt
from kedge.training import PlainProgress, validate_recipe
from kedge.training.experience import Experience
from kedge.training.inputs import Materials, load_inputs
from kedge.training.loop import Session
from kedge.training.policy import PolicyWork
from kedge.training.resources import make_model, prepare_policy
from kedge.training.stages import policy_work
from tests.training.small import GRPO, MODEL, PPO, recipe

BASE: dict[str, Any] = {
    **GRPO,
    "steps": 3,
    "epochs": 2,
    "minibatches": 2,
    "evaluation": None,
    "entropy_bonus": 0.01,
    "compute": {"micro_batch": 8},
}

OF_PPO: dict[str, Any] = {
    **PPO,
    "steps": 2,
    "evaluation": None,
    "rollout": {**PPO["rollout"], "prompts_per_step": 16, "responses_per_prompt": 1},
    "trust_region": {"penalty": {"beta": 1.0, "target": 1e-3}, "mask": {"threshold": 0.05}},
}
"""With everything that ties the policy to the old one; minibatches of 8 responses."""

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
    "ppo": OF_PPO,
    "ppo, shared critic, responses masked": {
        **OF_PPO,
        "critic": {"shared": True},
        "trust_region": {"mask": {"measure": "kl", "threshold": 0.01, "level": "response"}},
    },
}


OFTEN = ("sequence anchor with baseline", "ppo, shared critic, responses masked")
"""In every run of the tests; the others in `make acceptance`."""

EVERYWHERE = "gpt2"
"""Float64 all along; the norms of others compute in float32, and what is added up before them differs by that after."""


def weights(
    folder: Path, stage: dict[str, Any], dtype: str, architecture: str = EVERYWHERE
) -> dict[str, torch.Tensor]:
    """Policy and, where there is one, critic after a run."""
    folder.mkdir(parents=True)
    made = {**MODEL, "build": {**MODEL["build"], "architecture": architecture}, "dtype": dtype}
    run = kedge.train(recipe(folder, stage, model=made)).stages[stage["name"]]
    critic = load_state(run.model.resolve().parent)["work"]["critic"] or {"weights": {}}
    found = {f"critic.{name}": value for name, value in critic["weights"].items()}
    return {**load_file(run.model / "model.safetensors"), **found}


@pytest.mark.filterwarnings("ignore:.*use_reentrant.*:UserWarning")
@pytest.mark.parametrize("objective", [
    pytest.param(stage, id=name, marks=[] if name in OFTEN else pytest.mark.acceptance)
    for name, stage in OBJECTIVES.items()
])  # fmt: skip
def test_float64(objective: dict[str, Any], tmp_path: Path) -> None:
    stage = {**BASE, **objective}
    expected = weights(tmp_path / "base", stage, "float64")
    for name, compute in SAME.items():
        found = weights(tmp_path / name, {**stage, "compute": {**stage["compute"], **compute}}, "float64")
        worst = max(float((found[key] - expected[key]).abs().max()) for key in expected)
        assert worst < 1e-10, f"{name}: {worst}"


@pytest.mark.filterwarnings("ignore:.*use_reentrant.*:UserWarning")
@pytest.mark.parametrize("architecture", [EVERYWHERE, "llama"])
def test_float32(architecture: str, tmp_path: Path) -> None:
    stage = {**BASE, "steps": 1, "optimizer": {"learning_rate": 1e-3, "eps": 1e-3}}
    expected = weights(tmp_path / "base", stage, "float32", architecture)
    for name, compute in SAME.items():
        changed = {**stage, "compute": {**stage["compute"], **compute}}
        found = weights(tmp_path / name, changed, "float32", architecture)
        assert max(float((found[key] - expected[key]).abs().max()) for key in expected) < 1e-5


def test_a_setting_that_acts_is_seen(tmp_path: Path) -> None:
    """The comparison can fail: another aggregation gives other weights."""
    expected = weights(tmp_path / "base", BASE, "float64")
    found = weights(tmp_path / "other", {**BASE, "aggregation": {"mode": "sequence_mean"}}, "float64")
    assert max(float((found[key] - expected[key]).abs().max()) for key in expected) > 1e-6


@pytest.fixture(params=[BASE, OF_PPO, {**OF_PPO, "critic": {"shared": True}}], ids=["grpo", "ppo", "shared"])
def work(request: pytest.FixtureRequest, tmp_path: Path) -> PolicyWork:
    """The work of one stage in float64, with a moved policy, so that no KL is zero."""
    config = recipe(tmp_path, request.param, model={**MODEL, "dtype": "float64"})
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


def gradients(work: PolicyWork, batch: Experience) -> torch.Tensor:
    """Of the policy and, where there is one, of the critic."""
    trained = [work.session.model, *([work.critic.critic] if work.critic is not None else [])]
    for module in trained:
        module.zero_grad()
    work.accumulate(batch)
    if work.critic is not None and work.critic.critic.backbone is not None:
        hidden = work.scorer.hidden(work.critic.critic.backbone, batch.rollout)
        work.critic.losses(hidden, batch, slice(None)).sum().backward()
    return torch.cat([p.grad.flatten() for m in trained for p in m.parameters() if p.grad is not None])


def gathered(work: PolicyWork) -> Experience:
    experience, _ = work.gatherer.gather(0, work.loss())
    work.old_head = work.scorer.head(work.session.model).snapshot()
    return experience


def test_order_in_the_batch(work: PolicyWork) -> None:
    experience = gathered(work)
    count = len(experience.rollout.group)
    orders = (torch.arange(count), torch.arange(count).flip(0))
    found = [gradients(work, experience.select(order)) for order in orders]
    assert float((found[0] - found[1]).abs().max()) < 1e-10
    assert float(found[0].abs().max()) > 1e-4


def test_prompt_tokens_never_contribute(work: PolicyWork, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hidden states inside the prompt get no gradient, those that predict a response token do."""
    experience = gathered(work)
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
    monkeypatch.setattr(scoring, "shares_prompts", lambda model: False)  # or these alone are returned
    work.accumulate(experience)
    gradient = torch.cat([hidden.grad for hidden in seen if hidden.grad is not None])
    touched = gradient.abs().sum(dim=1) > 0
    predicting = torch.zeros_like(touched)
    predicting[rollout.predicting()] = True
    assert not bool((touched & ~predicting).any())
    assert bool(touched[predicting].all())


@pytest.mark.parametrize("method", ["grpo", "ppo"])
def test_float64_is_float64_throughout(method: str, tmp_path: Path) -> None:
    """Rewards of 1 to 3 beside 2²⁷, where float32 goes in steps of 8 and 16: what is learnt is the difference."""
    reward = tmp_path / "high.py"
    base = {**GRPO, "advantage": {"kind": "mean"}}
    if method == "ppo":  # whitened, and with a trace of 1 all tokens of a response have its reward
        base = {**OF_PPO, "advantage": {"trace": 1.0}}
    stage = {**base, "name": method, "steps": 1, "evaluation": None, "epochs": 2, "minibatches": 1}
    stage = {
        **stage,
        "compute": {"micro_batch": 16},
        "rewards": {"functions": [{"function": f"{reward}:high"}]},
    }
    found = []
    for offset in (0.0, 2.0**27):
        reward.write_text(
            "def high(prompts, completions, **columns):\n"
            f"    return [{offset} + len(set(text)) % 3 for text in completions]\n"
        )
        given = recipe(tmp_path, stage, model={**MODEL, "dtype": "float64"}, out=str(tmp_path / str(offset)))
        (row,) = kedge.train(given).stages[method].metrics
        found.append(row["gradient/norm"])
    assert found[0] > 1e-3
    assert found[1] == pytest.approx(found[0], rel=1e-6)
