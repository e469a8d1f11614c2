"""A reward model trained by a recipe: its figures, its invariances, what it leaves behind."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import kedge
from kedge.models import build_model, fingerprint
from kedge.objective import brier_score, expected_calibration_error
from kedge.tasks import lexicon, prose, sums
from kedge.training.config import RewardStage
from kedge.training.measures import bayes_metrics, preference_metrics
from kedge.training.resources import make_scorer
from tests.training.small import PROSE, REWARD, recipe

WHOLE_RUN: dict[str, Any] = {
    **REWARD,
    "checkpoint": {"every": 100},
    "evaluation": None,
    "true_preference": None,
}


def trained(folder: Path, stage: dict[str, Any], **changes: Any) -> kedge.api.StageResult:
    folder.mkdir(exist_ok=True)
    return kedge.train(recipe(folder, stage, **{"model": PROSE, **changes})).stages["scores"]


def weights(folder: Path, stage: dict[str, Any], dtype: str = "float64") -> dict[str, torch.Tensor]:
    run = trained(folder, stage, model={**PROSE, "dtype": dtype})
    return load_file(run.model / "model.safetensors")


def noisy_pairs(file: Path, count: int, seed: int) -> str:
    """Happy sentences are preferred to sad ones, but for one in five."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        sides = [
            f"the {draw.choice(lexicon.ADJECTIVES[kind])} sailor sings ." for kind in ("positive", "negative")
        ]
        if draw.random() < 0.2:
            sides.reverse()
        rows.append({"prompt": "topic : sea", "chosen": sides[0], "rejected": sides[1]})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(file)


def test_it_learns_and_says_how_well(tmp_path: Path) -> None:
    known = tmp_path / "known.py"
    known.write_text(
        "from kedge.tasks.prose import proxy\n"
        "def known(prompts, chosen, rejected):\n"
        "    return [0.8 if happy > 1 else 0.2 for happy in proxy(prompts, chosen)]\n",
        encoding="utf-8",
    )
    stage = {**REWARD, "steps": 30, "batch_size": 16, "compute": {"micro_batch": 32}}
    stage["true_preference"] = f"{known}:known"
    stage["data"] = {"path": noisy_pairs(tmp_path / "train.jsonl", 480, 0)}
    heldout = noisy_pairs(tmp_path / "heldout.jsonl", 200, 1)
    stage["evaluation"] = {"data": {"path": heldout}, "every": 100}
    first, *rest = trained(tmp_path, stage).metrics
    assert [row["step"] for row in rest] == list(range(1, 31))
    assert all(math.isfinite(value) for row in rest for value in row.values())
    start, end = (
        {name.removeprefix("eval/preference/"): value for name, value in row.items()}
        for row in (first, rest[-1])
    )
    assert end["accuracy"] - 0.5 >= 0.95 * (end["accuracy_bayes"] - 0.5)
    assert end["accuracy_bayes"] == pytest.approx(0.8, abs=0.09)
    assert end["cross_entropy_bayes"] < end["cross_entropy"] < start["cross_entropy"] - 0.05
    assert end["calibration_error"] < 0.15
    assert end["margin_mean"] > 0.3


def test_the_figures_are_those_of_the_saved_model(tmp_path: Path) -> None:
    """Accuracy, cross-entropy and calibration again, one pair after another, through transformers alone."""
    run = trained(tmp_path, REWARD, seed=5)
    model = AutoModelForSequenceClassification.from_pretrained(run.model).eval()
    tokenizer = AutoTokenizer.from_pretrained(run.model)
    from kedge.runs.seeds import derive_seed

    pairs = prose.preferences("heldout", 32, derive_seed(5, "data"))

    def score(prompt: str, response: str) -> float:
        ids = [*tokenizer.encode(prompt), *tokenizer.encode(response), tokenizer.eos_token_id]
        with torch.no_grad():
            return float(model(input_ids=torch.tensor([ids])).logits[0, 0])

    deltas = torch.tensor(
        [score(p["prompt"], p["chosen"]) - score(p["prompt"], p["rejected"]) for p in pairs]
    )
    probability = torch.sigmoid(deltas.double())
    last = {name.removeprefix("eval/preference/"): value for name, value in run.metrics[-1].items()}
    assert last["accuracy"] == pytest.approx(float((deltas > 0).double().mean()))
    assert last["cross_entropy"] == pytest.approx(-float(probability.log().mean()), rel=1e-4)
    assert last["brier_score"] == pytest.approx(brier_score(probability), rel=1e-4)
    assert last["calibration_error"] == pytest.approx(expected_calibration_error(probability), abs=1e-4)
    assert last["margin_mean"] == pytest.approx(float(deltas.mean()), rel=1e-3, abs=1e-6)
    known = prose.preference(*([p[side] for p in pairs] for side in ("prompt", "chosen", "rejected")))
    best = sum(0.5 if p == 0.5 else float(p > 0.5) for p in known) / len(known)
    assert last["accuracy_bayes"] == pytest.approx(best)
    assert last["cross_entropy_bayes"] == pytest.approx(-sum(map(math.log, known)) / len(known), rel=1e-9)


def test_ties_are_half_right() -> None:
    found = preference_metrics(torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, 0.0, 1.0]))
    assert found["preference/accuracy"] == 0.5
    known = bayes_metrics(torch.tensor([0.9, 0.5, 0.2], dtype=torch.float64))
    assert known["preference/accuracy_bayes"] == 0.5
    expected = -(math.log(0.9) + math.log(0.5) + math.log(0.2)) / 3
    assert known["preference/cross_entropy_bayes"] == pytest.approx(expected)


SAME: dict[str, dict[str, Any]] = {
    "one pair at a time": {"micro_batch": 2},
    "uneven parts": {"micro_batch": 6},
    "packed": {"layout": "packed"},
}


def test_micro_batches_and_layout_change_nothing(tmp_path: Path) -> None:
    expected = weights(tmp_path / "base", WHOLE_RUN)
    for name, compute in SAME.items():
        found = weights(tmp_path / name, {**WHOLE_RUN, "compute": {**WHOLE_RUN["compute"], **compute}})
        assert max(float((found[key] - expected[key]).abs().max()) for key in expected) < 1e-8, name
    other = weights(tmp_path / "other", {**WHOLE_RUN, "batch_size": 7})
    assert max(float((other[key] - expected[key]).abs().max()) for key in expected) > 1e-4


def test_margins_act(tmp_path: Path) -> None:
    found = []
    for name, margin in (("none", None), ("zero", 0.0), ("two", 2.0)):
        rows = [{**row, "margin": margin} for row in prose.preferences("train", 16, seed=0)]
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        run = trained(tmp_path / name, {**WHOLE_RUN, "data": {"path": str(file)}, "steps": 2})
        found.append(run.metrics[0]["loss"])
        assert run.metrics[0]["preference/cross_entropy"] == pytest.approx(found[0], rel=1e-6)
    assert found[0] == found[1]
    assert found[2] > found[0] + 1.0


def test_the_policy_stays_as_it_is(tmp_path: Path) -> None:
    tokenizer = sums.tokenizer()
    model = build_model(len(tokenizer), hidden_size=32, layers=1, heads=2, context=48, pad_id=0, eos_id=1)
    before = fingerprint(model)
    file = tmp_path / "pairs.jsonl"
    pair = {"prompt": "1+2=", "chosen": "#3", "rejected": "#4"}
    file.write_text(json.dumps(pair) + "\n", encoding="utf-8")
    stage = {**WHOLE_RUN, "data": {"path": str(file)}}
    config = {"name": "memory", "out": str(tmp_path / "run"), "stages": [stage]}
    kedge.train(config, model=model, tokenizer=tokenizer)
    assert fingerprint(model) == before
    kedge.train({**config, "resume": True}, model=model, tokenizer=tokenizer)
    assert fingerprint(model) == before


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen3", "gemma2", "mistral"])
def test_architectures(architecture: str, tmp_path: Path) -> None:
    run = trained(
        tmp_path,
        {**REWARD, "steps": 2},
        model={**PROSE, "build": {**PROSE["build"], "architecture": architecture}},
    )
    saved = AutoModelForSequenceClassification.from_pretrained(run.model)
    assert saved.config.num_labels == 1
    assert saved.config.model_type == architecture
    assert all(math.isfinite(row["loss"]) for row in run.metrics[1:])


def test_training_goes_on_from_a_path(tmp_path: Path) -> None:
    """Its own tokenizer, its own weights, whatever the policy is."""
    first = trained(tmp_path / "first", REWARD)
    policy = {
        "build": {"hidden_size": 16, "layers": 1, "heads": 2, "context": 48},
        "tokenizer": {"task": "sums"},
    }
    stage = {**REWARD, "path": str(first.model)}
    second = trained(tmp_path / "second", stage, model=policy)
    started, ended = second.metrics[0], first.metrics[-1]
    for name in ("accuracy", "cross_entropy"):
        assert started[f"eval/preference/{name}"] == pytest.approx(ended[f"eval/preference/{name}"], rel=1e-5)
    assert AutoTokenizer.from_pretrained(second.model).get_vocab() == prose.tokenizer().get_vocab()


def test_dropout_is_off(tmp_path: Path) -> None:
    tokenizer = prose.tokenizer()
    policy = build_model(len(tokenizer), architecture="gpt2", hidden_size=16, layers=1, heads=2, context=96)
    assert policy.config.attn_pdrop > 0
    stage = RewardStage.model_validate(WHOLE_RUN)
    assert make_scorer(stage, policy, tokenizer, seed=0).config.attn_pdrop == 0


def test_too_long_pairs_are_left_out_and_counted(tmp_path: Path) -> None:
    run = trained(tmp_path, {**WHOLE_RUN, "max_tokens": 14, "steps": 1, "batch_size": 2})
    assert "of 64 pairs are too long and were left out" in (run.path / "log.txt").read_text()
