"""Runs of a small model, from start to end, through the function that people call."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import kedge
from kedge.errors import RunError, UserError
from kedge.models import build_model, fingerprint, save_model
from kedge.objective import Budget
from kedge.runs import read_metrics, read_samples
from kedge.tasks import sums
from tests.training.small import GRPO, SFT, recipe, without_clock


def test_chain_of_stages(tmp_path: Path) -> None:
    result = kedge.train(recipe(tmp_path, SFT, GRPO))
    sft, grpo = result.stages["sft"], result.stages["grpo"]
    assert [row["step"] for row in grpo.metrics] == [0, 1, 2, 3, 4]
    assert (
        sft.metrics[-1]["eval/cross_entropy/data_policy"] < sft.metrics[0]["eval/cross_entropy/data_policy"]
    )
    assert grpo.metrics[0]["eval/kl/policy_reference/exact"] == pytest.approx(0, abs=1e-9)
    assert grpo.metrics[-1]["eval/kl/policy_reference/exact"] > 0
    started = json.loads((grpo.path / "environment.json").read_text())["reference"]
    assert started == fingerprint(AutoModelForCausalLM.from_pretrained(sft.model))
    assert (result.path / "report.html").stat().st_size > 10_000
    sample = grpo.samples[-1]
    assert len(sample["kl"]) == len(sample["tokens"])
    assert min(sample["kl"]) >= 0


def test_equal_seeds_give_equal_runs(tmp_path: Path) -> None:
    rows = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        folder = tmp_path / name
        folder.mkdir()
        rows.append(without_clock(kedge.train(recipe(folder, seed=seed)).stages["grpo"].metrics))
    assert repr(rows[0]) == repr(rows[1])
    assert repr(rows[0]) != repr(rows[2])


def test_objects_in_memory(tmp_path: Path) -> None:
    def even(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        assert columns["answer"]
        return [float(len(text) % 2 == 0) for text in completions]

    tokenizer = sums.tokenizer()
    model = build_model(
        len(tokenizer), hidden_size=32, layers=1, heads=2, context=48, seed=0, pad_id=0, eos_id=1
    )
    stage = {**GRPO, "rewards": None}
    before = fingerprint(model)
    config = {"name": "memory", "out": str(tmp_path / "run"), "stages": [stage]}
    result = kedge.train(config, model=model, tokenizer=tokenizer, rewards=[even])
    assert fingerprint(model) != before
    assert "reward/even" in result.stages["grpo"].metrics[-1]
    saved = AutoModelForCausalLM.from_pretrained(result.stages["grpo"].model)
    assert fingerprint(saved) == fingerprint(model)


def test_chat_messages(tmp_path: Path) -> None:
    """Messages go through the template; reward functions see message lists, as in TRL."""
    seen: list[Any] = []

    def polite(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float | None]:
        seen.append((prompts[0], completions[0], columns["level"][0]))
        return [
            None if index == 0 else float(len(messages[0]["content"]))
            for index, messages in enumerate(completions)
        ]

    tokenizer = sums.tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}="
    model = build_model(
        len(tokenizer), hidden_size=32, layers=1, heads=2, context=48, seed=0, pad_id=0, eos_id=1
    )
    chat = [{"prompt": [{"role": "user", "content": f"{a}+{a + 1}"}], "level": a} for a in range(10, 20)]
    file = tmp_path / "chat.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in chat), encoding="utf-8")
    stage = {**GRPO, "steps": 2, "evaluation": None, "rewards": None, "data": {"path": str(file)}}
    config = {"name": "chat", "out": str(tmp_path / "run"), "stages": [stage]}
    rows = kedge.train(config, model=model, tokenizer=tokenizer, rewards=[polite]).stages["grpo"].metrics
    prompt, completion, level = seen[0]
    assert prompt == [{"role": "user", "content": f"{level}+{level + 1}"}]
    assert completion[0]["role"] == "assistant"
    assert rows[0]["reward/unscorable_fraction"] == pytest.approx(1 / 16)


def test_kl_is_measured_without_an_anchor(tmp_path: Path) -> None:
    stage = {**GRPO, "anchor": {"controller": {"kind": "fixed", "beta": 0.0}}}
    last = kedge.train(recipe(tmp_path, stage)).stages["grpo"].metrics[-1]
    assert last["anchor/beta"] == 0
    assert last["kl/policy_reference/exact"] > 0


ANCHORS: dict[str, dict[str, Any]] = {
    "exact sequence": {"gradient": "sequence"},
    "exact sequence, prefix weights, baseline": {
        "gradient": "sequence",
        "weights": "prefix",
        "baseline": True,
    },
    "exact forward": {"direction": "forward"},
    "k1 token": {"measure": "k1"},
    "k1 sequence": {"measure": "k1", "gradient": "sequence"},
    "k2 published": {"measure": "k2", "gradient": "published"},
    "k3 published": {"measure": "k3", "gradient": "published"},
    "k3 token": {"measure": "k3"},
    "k1 in the reward": {"measure": "k1", "placement": "reward", "gradient": "published"},
    "k1 in the reward, sequence": {"measure": "k1", "placement": "reward", "gradient": "sequence"},
    "k3 in the reward": {"measure": "k3", "placement": "reward", "gradient": "published"},
}
"""Every way that the configuration allows, by name."""


@pytest.mark.parametrize("anchor", ANCHORS.values(), ids=ANCHORS.keys())
def test_every_anchor_trains_and_holds(anchor: dict[str, Any], tmp_path: Path) -> None:
    """A strong anchor keeps the policy nearer than none: the setting acts."""
    kl = []
    for name, beta in (("free", 0.0), ("held", 20.0)):
        folder = tmp_path / name
        folder.mkdir()
        stage = {
            **GRPO,
            "steps": 4,
            "evaluation": None,
            "epochs": 2,
            "minibatches": 2,
            "advantage": {"kind": "mean"},
        }
        stage["anchor"] = {**anchor, "controller": {"kind": "fixed", "beta": beta}}
        stage["optimizer"] = {"learning_rate": 2e-3}
        kl.append(kedge.train(recipe(folder, stage)).stages["grpo"].metrics[-1]["kl/policy_reference/exact"])
    weak = anchor.get("measure") == "k3" and anchor.get("placement") == "reward"
    assert all(math.isfinite(value) for value in kl)
    assert kl[1] != kl[0] if weak else kl[1] < kl[0]


REGIONS: dict[str, dict[str, Any]] = {
    "sequence": {"trust_region": {"kind": "sequence", "low": 0.01, "high": 0.01}},
    "cispo": {"trust_region": {"kind": "cispo"}},
    "none": {"trust_region": {"kind": "none"}},
    "masked weights": {"correction": {"kind": "mask"}},
    "dr grpo": {"advantage": {"kind": "mean"}, "aggregation": {"mode": "constant"}},
    "leave one out": {"advantage": {"kind": "leave_one_out"}, "aggregation": {"mode": "sequence_mean"}},
    "reinforce": {"advantage": {"kind": "batch"}},
    "packed": {"compute": {"layout": "packed"}},
    "checkpointed activations": {"compute": {"activation_checkpointing": True}},
    "adaptive": {"anchor": {"controller": {"kind": "adaptive", "target": 0.01, "horizon": 64}}},
    "per response": {"anchor": {"controller": {"kind": "budget", "budget": 0.1, "unit": "nats/response"}}},
}


@pytest.mark.filterwarnings("ignore:.*use_reentrant.*:UserWarning")
@pytest.mark.parametrize("change", REGIONS.values(), ids=REGIONS.keys())
def test_settings_that_are_not_in_the_recipes_train(change: dict[str, Any], tmp_path: Path) -> None:
    stage = {**GRPO, "steps": 2, "epochs": 2, **change}
    rows = kedge.train(recipe(tmp_path, stage)).stages["grpo"].metrics
    assert all(math.isfinite(row["loss"]) for row in rows[1:])
    assert rows[-1]["trust_region/updates"] == 2


@pytest.mark.filterwarnings("ignore:.*use_reentrant.*:UserWarning")
def test_activations_are_recomputed_in_the_stages_that_say_so(tmp_path: Path) -> None:
    """Else the second stage of a run that is killed and resumed would round otherwise than that of one that is not."""
    tokenizer, weights = sums.tokenizer(), []
    for name in ("whole", "resumed"):
        (tmp_path / name).mkdir()
        stages = ({**SFT, "compute": {"activation_checkpointing": True}}, {**GRPO, "steps": 2, "epochs": 2})
        config = recipe(tmp_path / name, *stages)
        del config["model"]
        for part in (config,) if name == "whole" else ({**config, "stages": config["stages"][:1]}, config):
            model = build_model(
                len(tokenizer), hidden_size=32, layers=2, heads=2, context=48, seed=1, pad_id=0, eos_id=1
            )
            kedge.train({**part, "resume": part is config}, model=model, tokenizer=tokenizer)
        assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
        weights.append(fingerprint(model))
    assert weights[0] == weights[1]


def test_rewards_from_python_have_names_of_their_own(tmp_path: Path) -> None:
    tokenizer = sums.tokenizer()

    class Digits:
        def __call__(self, prompts: list[str], completions: list[str], **_: Any) -> list[float]:
            return [float(sum(letter.isdigit() for letter in text)) for text in completions]

    def train(rewards: Any) -> dict[str, Any]:
        model = build_model(
            len(tokenizer), hidden_size=32, layers=2, heads=2, context=48, seed=1, pad_id=0, eos_id=1
        )
        stage = {**GRPO, "steps": 1, "rewards": None, "evaluation": None}
        config = recipe(tmp_path, stage)
        config["out"] = str(tmp_path / str(len(list(tmp_path.iterdir()))))
        return (
            kedge.train(config, model=model, tokenizer=tokenizer, rewards=rewards).stages["grpo"].metrics[-1]
        )

    with pytest.raises(UserError, match="two of the functions given are called 'Digits'; give a dictionary"):
        train([Digits(), Digits()])
    row = train({"one": Digits(), "other": partial(Digits(), unused=1)})
    assert row["reward/one"] == row["reward/other"] > 0
    row = train([Digits(), partial(Digits(), unused=1)])
    assert row["reward/Digits"] == row["reward/partial"] > 0


def test_what_is_given_from_python_is_used_or_refused(tmp_path: Path) -> None:
    tokenizer = sums.tokenizer()

    def small(seed: int) -> Any:
        return build_model(
            len(tokenizer), hidden_size=32, layers=1, heads=2, context=48, seed=seed, pad_id=0, eos_id=1
        )

    def zero(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        return [0.0] * len(completions)

    save_model(small(2), tokenizer, tmp_path / "reference")
    anchored = {
        **GRPO,
        "steps": 1,
        "evaluation": None,
        "reference": {"path": str(tmp_path / "reference")},
    }
    other = {**anchored, "name": "other", "start": None, "reference": None}
    for stage in (anchored, SFT):
        with pytest.raises(UserError, match="no stage would use the one given from Python"):
            kedge.train(recipe(tmp_path, stage), model=small(1), tokenizer=tokenizer, reference=small(3))
        with pytest.raises(UserError, match="no stage would use 'zero' given from Python"):
            kedge.train(recipe(tmp_path, stage), model=small(1), tokenizer=tokenizer, rewards=[zero])
    run = kedge.train(
        recipe(tmp_path, anchored, other), model=small(1), tokenizer=tokenizer, reference=small(3)
    )
    hashes = [
        json.loads((stage.path / "environment.json").read_text())["reference"]
        for stage in run.stages.values()
    ]
    assert hashes == [fingerprint(small(2)), fingerprint(small(3))]


def test_a_file_of_rewards_is_run_once(tmp_path: Path) -> None:
    """For all functions, stages and evaluations: what it loads is there once, and process pools find its functions."""
    file, log = tmp_path / "mine.py", tmp_path / "log"
    file.write_text(
        "import pathlib, pickle\n"
        f"with pathlib.Path({str(log)!r}).open('a') as log:\n    log.write('run\\n')\n"
        "def one(prompts, completions, **columns):\n"
        "    assert pickle.loads(pickle.dumps(one)) is one\n"
        "    return [float(len(text)) for text in completions]\n"
        "def other(prompts, completions, **columns):\n"
        "    return one(prompts, completions)\n",
        encoding="utf-8",
    )
    rewards = {"functions": [{"function": f"{file}:one"}, {"function": f"{file}:other"}]}
    stages = [{**GRPO, "name": name, "steps": 1, "rewards": rewards} for name in ("first", "second")]
    kedge.train(recipe(tmp_path, *stages))
    assert log.read_text() == "run\n"


def test_a_forward_anchor_holds_the_forward_kl(tmp_path: Path) -> None:
    """The budget is of the KL that is weighed, measured on all responses before the first update."""
    controller = {"kind": "budget", "budget": 0.05, "unit": "nats/response"}
    stage = {
        **GRPO,
        "evaluation": None,
        "epochs": 2,
        "anchor": {"direction": "forward", "controller": controller},
    }
    rows = kedge.train(recipe(tmp_path, stage)).stages["grpo"].metrics
    expected = Budget(0.05, "nats/response")
    for row in rows:
        assert row["anchor/beta"] == pytest.approx(expected.beta)
        assert row["anchor/forward_budget_per_response"] == 0.05
        expected.update(row["kl/reference_policy/exact_per_response"], responses=16)
    last = rows[-1]
    assert last["kl/reference_policy/exact"] != last["kl/policy_reference/exact"]
    per_response = last["kl/reference_policy/exact"] * last["length/mean"]
    assert last["kl/reference_policy/exact_per_response"] == pytest.approx(per_response)


def test_a_policy_with_adapters_is_refused(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    tokenizer = sums.tokenizer()
    model = build_model(
        len(tokenizer), hidden_size=32, layers=2, heads=2, context=48, seed=1, pad_id=0, eos_id=1
    )
    model.add_adapter(peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(
        UserError, match=r"has adapters, and a checkpoint of it could not be gone on from.*merge_and"
    ):
        kedge.train(recipe(tmp_path), model=model, tokenizer=tokenizer)
    assert not (tmp_path / "run").exists()


def test_prompts_at_once_change_no_response(tmp_path: Path) -> None:
    """Only how many rows go through the model at once."""
    tokenizer, rows = sums.tokenizer(), []
    for at_once, most in ((None, 16), (1, 4), (3, 12)):
        folder = tmp_path / f"{at_once}"
        folder.mkdir()
        stage = {**GRPO, "steps": 1, "evaluation": None}
        stage["rollout"] = {**GRPO["rollout"], "prompts_at_once": at_once}
        model = build_model(
            len(tokenizer), hidden_size=32, layers=2, heads=2, context=48, seed=1, pad_id=0, eos_id=1
        )
        passes: list[tuple[int, int]] = []
        model.get_decoder().register_forward_pre_hook(
            lambda module, args, given, passes=passes: passes.append(tuple(given["input_ids"].shape)),
            with_kwargs=True,
        )
        run = kedge.train(recipe(folder, stage), model=model, tokenizer=tokenizer)
        rows.append(run.stages["grpo"].metrics[-1])
        assert max(count for count, length in passes if length == 1) == most
    for row in rows[1:]:
        for name in ("reward/mean", "length/mean", "gradient/norm"):
            assert row[name] == pytest.approx(rows[0][name], rel=1e-5), name


def test_a_constant_length_divides_the_whole_loss(tmp_path: Path) -> None:
    """Surrogate and anchor alike, so that β in nats a response means the same at any constant."""
    tokenizer, rows = sums.tokenizer(), []
    controller = {"kind": "budget", "budget": 1.0, "unit": "nats/response", "beta": 0.5}
    for length in (1, 8):
        folder = tmp_path / f"{length}"
        folder.mkdir()
        stage = {
            **GRPO,
            "steps": 1,
            "evaluation": None,
            "aggregation": {"mode": "constant", "constant_length": length},
            "anchor": {"gradient": "sequence", "controller": controller},
        }
        policy, reference = (
            build_model(
                len(tokenizer), hidden_size=32, layers=2, heads=2, context=48, seed=seed, pad_id=0, eos_id=1
            )
            for seed in (1, 2)
        )
        given = recipe(folder, stage)
        del given["model"]
        run = kedge.train(given, model=policy, tokenizer=tokenizer, reference=reference)
        rows.append(run.stages["grpo"].metrics[-1])
    assert rows[0]["kl/policy_reference/exact"] > 1e-3
    for name in ("loss", "gradient/norm"):
        assert rows[0][name] == pytest.approx(8 * rows[1][name], rel=1e-4)


def test_stops_at_a_kl_limit(tmp_path: Path) -> None:
    stage = {
        **GRPO,
        "epochs": 6,
        "old_kl_limit": 1e-4,
        "optimizer": {"learning_rate": 1e-2},
        "evaluation": None,
    }
    rows = kedge.train(recipe(tmp_path, stage)).stages["grpo"].metrics
    assert all(1 <= row["trust_region/updates"] < 6 for row in rows)
    assert all(row["kl/old_policy/exact"] > 1e-4 for row in rows)


def test_exact_old_kl_is_zero_before_the_first_update(tmp_path: Path) -> None:
    stage = {**GRPO, "minibatches": 2, "old_kl_limit": 1e9, "steps": 1, "optimizer": {"learning_rate": 1e-12}}
    row = kedge.train(recipe(tmp_path, stage)).stages["grpo"].metrics[-1]
    assert row["kl/old_policy/exact"] == pytest.approx(0, abs=1e-10)


def test_start_of_run_is_checked(tmp_path: Path) -> None:
    rows = kedge.train(recipe(tmp_path)).stages["grpo"].metrics
    first = rows[1]
    assert first["check/kl_policy_reference"] < 1e-6
    assert first["check/log_ratio_max"] < 1e-4
    assert first["check/sampler_log_prob_error_max"] < 1e-4
    assert "check/log_ratio_max" not in rows[2]


class Leaky(torch.nn.Module):
    """A layer that lets the batch's shape into the numbers."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.inner(hidden)
        wave = torch.sin(torch.arange(out.shape[-1], dtype=out.dtype))
        return out + 0.05 * hidden.shape[0] * wave


def test_a_batch_dependent_model_is_warned_about(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = sums.tokenizer()
    model = build_model(
        len(tokenizer), hidden_size=32, layers=1, heads=2, context=48, seed=0, pad_id=0, eos_id=1
    )
    model.model.layers[0].mlp = Leaky(model.model.layers[0].mlp)
    config = recipe(tmp_path, {**GRPO, "steps": 1, "evaluation": None})
    del config["model"]
    kedge.train(config, model=model, tokenizer=tokenizer)
    shown = capsys.readouterr().err
    assert "the same weights but KL(policy‖reference) is" in shown
    assert "the ratio at the first update is not 1" in shown
    assert "the sampler's log-probabilities differ" in shown


def test_not_finite_updates_are_skipped_and_stop_the_run(tmp_path: Path) -> None:
    reward = tmp_path / "huge.py"
    reward.write_text(
        "calls = 0\n"
        "def huge(prompts, completions, **columns):\n"
        "    global calls\n    calls += 1\n"
        "    scale = 3e38 if calls in (2, 4, 5, 6) else 1.0\n"
        "    return [scale if i % 2 else -scale for i in range(len(completions))]\n",
        encoding="utf-8",
    )
    stage = {
        **GRPO,
        "steps": 9,
        "evaluation": None,
        "advantage": {"kind": "mean"},
        "checkpoint": {"every": 100},
    }
    stage["rewards"] = {"functions": [{"function": f"{reward}:huge"}]}
    with pytest.raises(RunError, match="3 updates in a row"):
        kedge.train(recipe(tmp_path, stage))
    run = tmp_path / "run" / "grpo"
    rows = read_metrics(run)
    assert [row["skipped_updates"] for row in rows] == [0, 1, 1, 2, 3, 4]
    assert {row["step"] for row in read_samples(run) if row["kind"] == "skipped"} == {2, 4, 5, 6}
    saved = AutoModelForCausalLM.from_pretrained(run / "checkpoints" / "step-000006" / "model")
    assert all(bool(torch.isfinite(p).all()) for p in saved.parameters())


def test_best_checkpoint_stays(tmp_path: Path) -> None:
    stage = {
        **SFT,
        "steps": 12,
        "evaluation": {**SFT["evaluation"], "every": 2},
        "checkpoint": {"every": 2, "keep": 1},
    }
    stage["optimizer"] = {"learning_rate": 0.3}
    run = kedge.train(recipe(tmp_path, stage)).stages["sft"]
    values = {
        row["step"]: row["eval/cross_entropy/data_policy"] for row in run.metrics[1:] if row["step"] % 2 == 0
    }
    best = min(values, key=lambda step: values[step])
    assert (run.path / "checkpoints" / "best").readlink() == Path(f"step-{best:06d}")
    kept = {entry.name for entry in (run.path / "checkpoints").iterdir() if not entry.is_symlink()}
    assert kept == {f"step-{best:06d}", "step-000012"}


def test_true_distribution_is_shown_apart(tmp_path: Path) -> None:
    stage = {**SFT, "data": {"task": "prose", "count": 64}, "true_log_prob": "kedge.tasks.prose:log_prob"}
    stage["evaluation"] = {"data": {"task": "prose", "split": "heldout", "count": 32}, "every": 2}
    model = {
        "build": {"hidden_size": 32, "layers": 1, "heads": 2, "context": 96},
        "tokenizer": {"task": "prose"},
    }
    last = kedge.train(recipe(tmp_path, stage, model=model)).stages["sft"].metrics[-1]
    parts = last["eval/entropy/data"] + last["eval/kl/data_policy"]
    assert parts == pytest.approx(last["eval/cross_entropy/data_policy"])
    assert last["eval/kl/data_policy"] > 0


def test_a_reference_may_have_padded_embeddings(tmp_path: Path) -> None:
    """As models of one family have in different sizes: what no token stands for takes no part."""
    tokenizer = sums.tokenizer()
    model, reference = (
        build_model(len(tokenizer) + extra, hidden_size=32, layers=1, heads=2, context=48, pad_id=0, eos_id=1)
        for extra in (0, 3)
    )
    save_model(reference, tokenizer, tmp_path / "reference")
    stage = {**GRPO, "steps": 1, "evaluation": None, "reference": {"path": str(tmp_path / "reference")}}
    row = kedge.train(recipe(tmp_path, stage), model=model, tokenizer=tokenizer).stages["grpo"].metrics[-1]
    assert 0 < row["kl/policy_reference/exact"] < 1


def test_a_model_in_float16_is_refused(tmp_path: Path) -> None:
    tokenizer = sums.tokenizer()
    model = build_model(len(tokenizer), hidden_size=32, layers=1, heads=2, context=48, pad_id=0, eos_id=1)
    with pytest.raises(UserError, match=r"the model is in torch\.float16, whose range is too narrow"):
        kedge.train(recipe(tmp_path, GRPO), model=model.half(), tokenizer=tokenizer)
