"""PPO from start to end: every setting acts or is refused, it learns, the penalty holds the step."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import kedge
from kedge.cli import main
from kedge.errors import RunError, UserError
from kedge.models import build_model, load_critic, save_model
from kedge.runs import load_state, read_samples
from kedge.tasks import prose, sums
from kedge.training import validate_recipe
from tests.training.small import AGAINST_IT, GRPO, PPO, PROSE, REWARD, recipe

QUICK: dict[str, Any] = {**PPO, "steps": 2, "evaluation": None}
ONE_EACH = {**PPO["rollout"], "prompts_per_step": 16, "responses_per_prompt": 1}


def rows(folder: Path, stage: dict[str, Any], **changes: Any) -> list[dict[str, Any]]:
    folder.mkdir(exist_ok=True)
    return kedge.train(recipe(folder, stage, **changes)).stages[stage["name"]].metrics


CHANGES: dict[str, dict[str, Any]] = {
    "one response a prompt": {"rollout": ONE_EACH, "minibatches": 8},
    "shared": {"critic": {"shared": True, "coefficient": 0.1}},
    "values not clipped": {"critic": {"clip": None}},
    "short trace": {"advantage": {"discount": 0.99, "trace": 0.5, "whiten": False}},
    "sequence anchor": {"anchor": {"gradient": "sequence", "controller": {"kind": "fixed", "beta": 0.1}}},
    "sequence anchor with baseline": {
        "anchor": {"gradient": "sequence", "baseline": True, "controller": {"kind": "fixed", "beta": 0.1}}
    },
    "token anchor": {"anchor": {"controller": {"kind": "fixed", "beta": 0.1}}},
    "one update": {
        "epochs": 1,
        "minibatches": 1,
        "anchor": {"controller": {"kind": "fixed", "beta": 0.1}},
        "critic": {"optimizer": {"learning_rate": 3e-3}},
    },
    "fixed penalty": {"trust_region": {"kind": "none", "penalty": {"beta": 0.5}}},
    "responses masked": {
        "trust_region": {"kind": "cispo", "mask": {"measure": "kl", "threshold": 1e-3, "level": "response"}}
    },
    "two outcomes": {"trust_region": {"kind": "none", "mask": {"threshold": 1e-3, "form": "two_outcome"}}},
    "sequence ratio and penalty": {"trust_region": {"kind": "sequence", "penalty": {"target": 0.01}}},
    "cut responses left out": {"rollout": {**PPO["rollout"], "truncated": "mask"}},
    "weights for the sampler": {"correction": {"kind": "truncate"}},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_every_setting_trains(change: dict[str, Any], tmp_path: Path) -> None:
    found = rows(tmp_path, {**QUICK, **change})
    assert all(math.isfinite(row["loss"]) and math.isfinite(row["critic/loss"]) for row in found)
    assert found[-1]["trust_region/updates"] == change.get("epochs", 2) * change.get("minibatches", 2)
    assert found[-1]["skipped_updates"] == 0


LEARNING: dict[str, Any] = {
    **PPO,
    "steps": 40,
    "evaluation": None,
    "rollout": ONE_EACH,
    "anchor": {**PPO["anchor"], "controller": {"kind": "fixed", "beta": 0.02}},
    "critic": {"clip": None, "optimizer": {"learning_rate": 3e-3}},
    "checkpoint": {"every": 100},
}


@pytest.mark.acceptance
def test_it_learns(tmp_path: Path) -> None:
    """Digits are rewarded, eight of them at most: from a half to nearly all."""
    found = [row["reward/mean"] for row in rows(tmp_path, LEARNING)]
    assert sum(found[:5]) / 5 < 5.5
    assert sum(found[-5:]) / 5 > 7


def test_the_critic_learns_what_a_policy_at_rest_is_worth(tmp_path: Path) -> None:
    """The digits so far tell of the digits in all: what is explained grows, from nothing."""
    found = rows(tmp_path, {**LEARNING, "optimizer": {"learning_rate": 1e-6}})
    explained = [row["critic/explained_variance"] for row in found]
    assert explained[0] == pytest.approx(0, abs=1e-6)
    assert sum(explained[:8]) / 8 < 0.02
    assert sum(explained[-8:]) / 8 > 0.1
    assert found[-1]["critic/loss"] < found[0]["critic/loss"] / 4


def test_unscorable_responses_teach_neither(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No reward at all: policy and critic stay bit for bit as they are, whatever the epochs."""
    reward = tmp_path / "nothing.py"
    reward.write_text("def nothing(prompts, completions, **columns):\n    return [None] * len(prompts)\n")
    stage = {
        **QUICK,
        "rewards": {"functions": [{"function": f"{reward}:nothing"}]},
        "anchor": {**PPO["anchor"], "controller": {"kind": "fixed", "beta": 0.1}},
    }
    run = kedge.train(recipe(tmp_path, stage)).stages["ppo"]
    assert [row["reward/unscorable_fraction"] for row in run.metrics] == [1.0, 1.0]
    assert "warning: step 2: there is nothing to learn from" in " ".join(capsys.readouterr().err.split())
    assert all(row["gradient/norm"] == 0 and row["critic/gradient_norm"] == 0 for row in run.metrics)
    weights = load_state(run.model.resolve().parent)["work"]["critic"]["weights"]
    policy = load_file(run.model / "model.safetensors")
    assert all(
        torch.equal(weights[f"backbone.{name.removeprefix('model.')}"], policy[name]) for name in policy
    )
    assert not weights["head.weight"].any()


def test_what_is_unscorable_does_not_count_in_the_mean(tmp_path: Path) -> None:
    """Values of 0, returns of 2 where there is a reward: the value loss is ½·2², over those tokens alone."""
    reward = tmp_path / "half.py"
    reward.write_text(
        "def half(prompts, completions, **columns):\n"
        "    return [None if index % 2 else 2.0 for index in range(len(prompts))]\n"
    )
    stage = {
        **QUICK,
        "steps": 1,
        "epochs": 1,
        "minibatches": 1,
        "rewards": {"functions": [{"function": f"{reward}:half"}]},
        "anchor": {**PPO["anchor"], "controller": {"kind": "fixed", "beta": 0.0}},
        "critic": {},
        "advantage": {"trace": 1.0},
    }
    (row,) = rows(tmp_path, stage)
    assert row["reward/unscorable_fraction"] == 0.5
    assert row["critic/loss"] == pytest.approx(2.0)
    assert row["critic/return_mean"] == pytest.approx(2.0)


PENALISED = {
    **PPO,
    "steps": 6,
    "evaluation": None,
    "optimizer": {"learning_rate": 5e-3},
    "trust_region": {"kind": "none", "penalty": {"beta": 0.01, "target": 2e-3}},
}


@pytest.mark.parametrize("method", ["ppo", "grpo"])
def test_penalty_follows_its_target(method: str, tmp_path: Path) -> None:
    """β is doubled and halved by the KL that was recorded, exactly at the published thresholds."""
    region = PENALISED["trust_region"]
    stage = {**GRPO, **{key: PENALISED[key] for key in ("steps", "evaluation", "optimizer", "epochs")}}
    stage = PENALISED if method == "ppo" else {**stage, "trust_region": region}
    found = rows(tmp_path, stage)
    beta, moves = 0.01, set()
    for row in found:
        assert row["trust_region/beta"] == beta
        kl = row["kl/old_policy/exact_after_step"]
        factor = 0.5 if kl < 2e-3 / 1.5 else 2.0 if kl > 2e-3 * 1.5 else 1.0
        beta *= factor
        moves.add(factor)
    assert 2.0 in moves


def test_penalty_holds_the_step(tmp_path: Path) -> None:
    kl = []
    for beta in (0.0, 30.0):
        region = {"kind": "none", "penalty": {"beta": beta}}
        found = rows(tmp_path / str(beta), {**PENALISED, "steps": 3, "trust_region": region})
        kl.append(sum(row["kl/old_policy/exact_after_step"] for row in found))
    assert kl[1] < kl[0] / 2


def test_what_is_measured_after_a_step_is_exact(tmp_path: Path) -> None:
    """0 for a policy that stays; with one update a step, above what was measured before it, which is 0."""
    still = {**PENALISED, "steps": 1, "optimizer": {"learning_rate": 1e-12}}
    assert rows(tmp_path / "still", still)[0]["kl/old_policy/exact_after_step"] == pytest.approx(0, abs=1e-10)
    region = {"penalty": {"beta": 0.0}}
    once = {**PENALISED, "steps": 1, "epochs": 1, "minibatches": 1, "trust_region": region, "critic": {}}
    row = rows(tmp_path / "once", once)[0]
    assert row["kl/old_policy/exact"] == pytest.approx(0, abs=1e-10)
    assert row["kl/old_policy/exact_after_step"] > 1e-4


def test_the_penalty_is_measured_where_it_holds(tmp_path: Path) -> None:
    """KL(old‖policy) of transformers' own logits, over the responses that could be scored; β follows that figure."""
    words = sums.tokenizer()
    policy = build_model(len(words), hidden_size=32, layers=2, heads=2, context=48, pad_id=0, eos_id=1)
    old, answers = copy.deepcopy(policy), []

    def even(prompts: Any, completions: Any, prompt_ids: Any, completion_ids: Any) -> list[float | None]:
        pairs = list(zip(prompt_ids, completion_ids, strict=True))
        answers.extend(pairs)
        return [float(len(set(ids))) if sum(ids) % 2 == 0 else None for _, ids in pairs]

    stage = {**PENALISED, "steps": 1, "rewards": None, "trust_region": {"penalty": {"target": 0.01}}}
    given = {**recipe(tmp_path, stage), "model": {}}
    (row,) = kedge.train(given, model=policy, tokenizer=words, rewards=[even]).stages["ppo"].metrics
    assert 0 < row["reward/unscorable_fraction"] < 1

    def kl(responses: Any) -> float:
        found = []
        for prompt, ids in responses:
            whole, states = torch.tensor([[*prompt, *ids]]), slice(len(prompt) - 1, -1)
            p, q = (
                model(input_ids=whole).logits[0, states].double().log_softmax(-1) for model in (old, policy)
            )
            found.append((p.exp() * (p - q)).sum(-1).detach())
        return float(torch.cat(found).mean())

    scored = kl([(prompt, ids) for prompt, ids in answers if sum(ids) % 2 == 0])
    assert row["kl/old_policy/exact_after_step"] == pytest.approx(scored, rel=1e-4)
    assert abs(kl(answers) / scored - 1) > 0.01


def test_a_step_that_teaches_nothing_leaves_the_penalty_as_it_is(tmp_path: Path) -> None:
    reward = tmp_path / "nothing.py"
    reward.write_text("def nothing(prompts, completions, **columns):\n    return [None] * len(prompts)\n")
    stage = {**PENALISED, "steps": 3, "rewards": {"functions": [{"function": f"{reward}:nothing"}]}}
    found = rows(tmp_path, stage)
    assert [row["trust_region/beta"] for row in found] == [0.01] * 3
    assert all(math.isnan(row["kl/old_policy/exact_after_step"]) for row in found)


@pytest.mark.parametrize("level", ["token", "response"])
def test_a_mask_acts_beyond_its_threshold_alone(level: str, tmp_path: Path) -> None:
    losses = []
    for name, mask in (
        ("none", None),
        ("far", {"measure": "kl", "threshold": 1e3, "level": level}),
        ("near", {"measure": "kl", "threshold": 1e-4, "level": level}),
    ):
        found = rows(
            tmp_path / name, {**PENALISED, "steps": 2, "trust_region": {"kind": "none", "mask": mask}}
        )
        losses.append([row["loss"] for row in found])
        if mask is not None:
            assert (found[-1]["trust_region/masked_fraction"] > 0) == (name == "near")
    assert losses[0] == losses[1] != losses[2]


def test_a_critic_from_a_folder(tmp_path: Path) -> None:
    """Its first values are that model's: those of a reward model whose score is 0 everywhere are 0."""
    tokenizer = sums.tokenizer()
    other = build_model(
        len(tokenizer), hidden_size=16, layers=1, heads=2, context=48, seed=7, pad_id=0, eos_id=1
    )
    save_model(other, tokenizer, tmp_path / "critic")
    found = rows(tmp_path, {**QUICK, "critic": {"model": str(tmp_path / "critic")}})
    assert found[0]["critic/value_mean"] == 0
    assert found[1]["critic/value_mean"] != 0
    weights = load_state(tmp_path / "run" / "ppo" / "checkpoints" / "step-000002")["work"]["critic"][
        "weights"
    ]
    assert weights["head.weight"].shape == (1, 16)


def test_a_critic_from_an_earlier_stage(tmp_path: Path) -> None:
    """Reward model, then PPO against it: the critic starts from its backbone and from its score."""
    stage = {**QUICK, **{key: AGAINST_IT[key] for key in ("data", "rewards")}, "steps": 1}
    stage["critic"] = {"model": "scores", "optimizer": {"learning_rate": 1e-12}}
    result = kedge.train(
        recipe(tmp_path, {**REWARD, "evaluation": None, "true_preference": None}, stage, model=PROSE)
    )
    theirs = load_file(result.stages["scores"].model / "model.safetensors")
    state = load_state(result.stages["ppo"].model.resolve().parent)
    weights = state["work"]["critic"]["weights"]
    assert torch.allclose(weights["head.weight"], theirs["score.weight"], atol=1e-9)
    name = "layers.0.self_attn.q_proj.weight"
    assert torch.allclose(weights[f"backbone.{name}"], theirs[f"model.{name}"], atol=1e-9)
    assert result.stages["ppo"].metrics[0]["critic/value_mean"] != 0


def test_the_final_critic_is_left_as_a_model(tmp_path: Path) -> None:
    """A sequence classifier with the values of the checkpoint, from which another run's critic goes on."""
    run = kedge.train(recipe(tmp_path, QUICK)).stages["ppo"]
    trained = load_state(run.model.resolve().parent)["work"]["critic"]["weights"]
    left = load_critic(run.path / "critic").state_dict()
    assert left.keys() == trained.keys()
    assert all(torch.equal(left[name], trained[name]) for name in trained)
    assert trained["head.weight"].any()
    assert AutoModelForSequenceClassification.from_pretrained(run.path / "critic").num_labels == 1
    again = {**QUICK, "critic": {"model": str(run.path / "critic")}}
    assert rows(tmp_path / "again", again)[0]["critic/value_mean"] != 0


def test_a_shared_critic_leaves_no_model(tmp_path: Path) -> None:
    run = kedge.train(recipe(tmp_path, {**QUICK, **CHANGES["shared"]})).stages["ppo"]
    assert not (run.path / "critic").exists()


def test_a_critic_with_other_words_is_refused(tmp_path: Path) -> None:
    tokenizer = prose.tokenizer()
    other = build_model(len(tokenizer), hidden_size=16, layers=1, heads=2, context=48, pad_id=0, eos_id=1)
    save_model(other, tokenizer, tmp_path / "critic")
    with pytest.raises(UserError, match=r"critic: .* has another vocabulary than the policy"):
        rows(tmp_path, {**QUICK, "critic": {"model": str(tmp_path / "critic")}})
    with pytest.raises(UserError, match=r"no/such/critic"):
        rows(tmp_path, {**QUICK, "critic": {"model": "no/such/critic"}})
    assert not (tmp_path / "run").exists()


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "shared and a model": ({"critic": {"shared": True, "model": "somewhere"}}, "keep one"),
    "shared and optimizer": ({"critic": {"shared": True, "optimizer": {}}}, "one backbone has one optimizer"),
    "coefficient alone": ({"critic": {"coefficient": 0.5}}, "coefficient does nothing without shared"),
    "group advantage": ({"advantage": {"kind": "group"}}, "advantage.kind: unknown key"),
    "trace above 1": ({"advantage": {"trace": 1.1}}, "less than or equal to 1"),
    "equal groups": ({"rollout": {"resample_equal_groups": 1}}, "a critic learns from them"),
    "baseline of one": (
        {
            "rollout": ONE_EACH,
            "anchor": {
                "gradient": "sequence",
                "baseline": True,
                "controller": {"kind": "fixed", "beta": 1.0},
            },
        },
        "averages the other responses to the prompt, and responses_per_prompt is 1",
    ),
    "odd minibatches": (
        {"minibatches": 3},
        "does not divide the responses of a step (16). Near values that do: 1, 2, 4",
    ),
    "penalty with one update": (
        {"epochs": 1, "minibatches": 1, "trust_region": {"penalty": {}}},
        "trust_region.penalty does nothing with one update a step",
    ),
    "mask with one update": (
        {"epochs": 1, "minibatches": 1, "trust_region": {"mask": {"threshold": 0.1}}},
        "trust_region.mask does nothing with one update a step",
    ),
    "clip with one update": (
        {"epochs": 1, "minibatches": 1, "trust_region": {"high": 0.3}},
        "trust_region.high does nothing with one update a step",
    ),
    "dual with one update": (
        {"epochs": 1, "minibatches": 1, "trust_region": {"dual": 3.0}},
        "trust_region.dual does nothing with one update a step",
    ),
    "values clipped with one update": (
        {"epochs": 1, "minibatches": 1},
        "critic.clip does nothing with one update a step",
    ),
    "target without penalty": (
        {"trust_region": {"penalty": {"beta": 0.0, "target": 0.1}}},
        "stays 0 however often it is doubled",
    ),
    "total variation above 1": (
        {"trust_region": {"mask": {"threshold": 1.0}}},
        "a total variation is at most 1",
    ),
    "a critic from another method": (
        {"critic": {"model": "ppo"}},
        "'ppo' is no earlier stage of method: reward",
    ),
    "exact in the reward": ({"anchor": {**PPO["anchor"], "measure": "exact"}}, "drops its own gradient"),
}


@pytest.mark.parametrize(("change", "reason"), REFUSED.values(), ids=REFUSED.keys())
def test_refused(change: dict[str, Any], reason: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        validate_recipe(recipe(tmp_path, {**PPO, **change}))
    assert reason in str(caught.value)


def test_dry_run_shows_the_sizes(capsys: pytest.CaptureFixture[str]) -> None:
    change = "stages.ppo.trust_region={penalty: {target: 0.01}, mask: {threshold: 0.1}}"
    assert main(["train", "prose-ppo", change, "--dry-run"]) == 0
    shown = " ".join(capsys.readouterr().out.split())  # the table wraps
    for expected in (
        "64 (64 prompts × 1 responses)",
        "4 (2 epochs × 2 minibatches)",
        "32 (in 1 micro-batches of up to 64)",
        "penalty on exact",
        "β 1 towards 0.01 nats/token",
        "masked beyond exact tv 0.1",
        "backbone a copy of the policy's",
        "GAE with γ 1, λ 0.95",
    ):
        assert expected in shown


def test_a_policy_that_diverges_stops_the_run(tmp_path: Path) -> None:
    """With a beta to be set by a KL that is no number any more."""
    stage = {
        **QUICK,
        "steps": 4,
        "optimizer": {"learning_rate": 1e30, "max_gradient_norm": None},
        "trust_region": {"penalty": {"target": 0.01}},
    }
    with pytest.raises(RunError, match=r"learning_rate"):
        kedge.train(recipe(tmp_path, stage))


def test_a_critic_that_diverges_stops_the_run(tmp_path: Path) -> None:
    """The policy's updates are finite; the critic's are not, are refused, and after three in a row end the run."""
    stage = {
        **QUICK,
        "critic": {"clip": None, "optimizer": {"learning_rate": 1e30, "max_gradient_norm": None}},
    }
    with pytest.raises(RunError, match=r"critic\.optimizer\.learning_rate"):
        kedge.train(recipe(tmp_path, {**stage, "steps": 4}))
    run = tmp_path / "run" / "ppo"
    assert any(row["kind"] == "skipped" for row in read_samples(run))
    saved = AutoModelForCausalLM.from_pretrained(max((run / "checkpoints").iterdir()) / "model")
    assert all(bool(torch.isfinite(p).all()) for p in saved.parameters())
