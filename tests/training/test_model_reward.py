"""A reward model as a reward: what it scores is what was drawn, whatever the batch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import kedge
from kedge.errors import UserError
from kedge.models import build_model, fingerprint, reward_model_from, save_model, train_bpe
from kedge.rewards import RewardError
from kedge.runs import read_metrics
from kedge.tasks import prose
from kedge.training.config import ComputeConfig
from kedge.training.model_reward import ModelReward
from tests.training.small import AGAINST_IT, PROSE, REWARD, SFT, recipe, without_clock

PAIRS = prose.preferences("train", 12, seed=0)
PROMPTS = [row["prompt"] for row in PAIRS]
COMPLETIONS = [row["chosen"] for row in PAIRS]
WORDS = prose.tokenizer()
PROMPT_IDS = [WORDS.encode(text) for text in PROMPTS]
COMPLETION_IDS = [[*WORDS.encode(text), 1] for text in COMPLETIONS]
ENDED, CUT = [True] * 12, [False] * 12


def save_scorer(
    folder: Path, tokenizer: Any = WORDS, seed: int = 0, context: int = 96, labels: int = 1
) -> Path:
    policy = build_model(
        len(tokenizer), hidden_size=16, layers=1, heads=2, context=context, seed=seed, pad_id=0, eos_id=1,
        options={"initializer_range": 0.3},
    )  # fmt: skip
    model = reward_model_from(policy, seed=seed, pad_id=0, end_ids=(1,))
    if labels > 1:
        model.config.num_labels = labels
        model = type(model)(model.config)
    save_model(model, tokenizer, folder)
    return folder


def loaded(source: Path, **compute: Any) -> ModelReward:
    reward = ModelReward("scores", source, WORDS, (1,), ComputeConfig(**compute))
    reward.load(torch.device("cpu"), torch.float64)
    return reward


def test_micro_batches_and_order_change_nothing(tmp_path: Path) -> None:
    source = save_scorer(tmp_path)
    expected = loaded(source, micro_batch=64)(PROMPTS, COMPLETIONS, PROMPT_IDS, COMPLETION_IDS, ENDED)
    assert torch.tensor(expected).std() > 0.1
    for compute in ({"micro_batch": 1}, {"micro_batch": 5}, {"layout": "packed"}):
        found = loaded(source, **compute)(PROMPTS, COMPLETIONS, PROMPT_IDS, COMPLETION_IDS, ENDED)
        assert found == pytest.approx(expected, abs=1e-10)
    turned = [column[::-1] for column in (PROMPTS, COMPLETIONS, PROMPT_IDS, COMPLETION_IDS, ENDED)]
    assert loaded(source)(*turned)[::-1] == pytest.approx(expected, abs=1e-10)


def test_it_is_frozen_and_in_evaluation_mode(tmp_path: Path) -> None:
    reward = loaded(save_scorer(tmp_path))
    assert reward.model is not None
    assert not reward.model.training
    assert not any(parameter.requires_grad for parameter in reward.model.parameters())
    reward(PROMPTS[:2], COMPLETIONS[:2], PROMPT_IDS[:2], COMPLETION_IDS[:2], ENDED[:2])
    assert all(parameter.grad is None for parameter in reward.model.parameters())


def test_the_drawn_tokens_are_scored_and_not_their_text(tmp_path: Path) -> None:
    """A response that was cut has no end token, and its score says so."""
    reward = loaded(save_scorer(tmp_path))
    assert reward.tokenizer is None
    whole = reward(PROMPTS, COMPLETIONS, PROMPT_IDS, COMPLETION_IDS, ENDED)
    without_end = [ids[:-1] for ids in COMPLETION_IDS]
    cut = reward(PROMPTS, COMPLETIONS, PROMPT_IDS, without_end, CUT)
    assert all(abs(a - b) > 1e-6 for a, b in zip(whole, cut, strict=True))
    assert reward(PROMPTS, ["?"] * 12, PROMPT_IDS, COMPLETION_IDS, ENDED) == whole
    by_stop_string = reward(PROMPTS, COMPLETIONS, PROMPT_IDS, without_end, ENDED)
    assert by_stop_string == pytest.approx(whole)


def test_another_tokenizer_reads_the_text(tmp_path: Path) -> None:
    """The policy's ids mean nothing to it; an end is put behind the responses that ended."""
    pieces = train_bpe([f"{p} {c}" for p, c in zip(PROMPTS, COMPLETIONS, strict=True)], 300)
    reward = loaded(save_scorer(tmp_path, pieces, context=256), micro_batch=3)
    assert reward.tokenizer is not None
    nonsense = [[0]] * 12
    ended = reward(PROMPTS, COMPLETIONS, nonsense, [[5, 1]] * 12, ENDED)
    by_stop_string = reward(PROMPTS, COMPLETIONS, nonsense, [[5]] * 12, ENDED)
    cut = reward(PROMPTS, COMPLETIONS, nonsense, [[5]] * 12, CUT)
    assert reward.model is not None
    for end, found in (([1], ended), ([1], by_stop_string), ([], cut)):
        for prompt, completion, score in zip(PROMPTS, COMPLETIONS, found, strict=True):
            ids = torch.tensor([[*pieces.encode(prompt), *pieces.encode(completion), *end]])
            assert score == pytest.approx(float(reward.model(input_ids=ids).logits.detach()), abs=1e-10)


def config(folder: Path, *functions: dict[str, Any], **changes: Any) -> dict[str, Any]:
    stage = {
        **AGAINST_IT,
        "steps": 2,
        "evaluation": None,
        "rewards": {"functions": list(functions)},
        **changes,
    }
    return recipe(folder, stage, model=PROSE)


def test_by_path_with_another_tokenizer_said_once(tmp_path: Path) -> None:
    pieces = train_bpe([f"{p} {c}" for p, c in zip(PROMPTS, COMPLETIONS, strict=True)], 300)
    source = save_scorer(tmp_path / "mine", pieces, context=256)
    run = kedge.train(config(tmp_path, {"model": str(source), "micro_batch": 3})).stages["grpo"]
    log = (run.path / "log.txt").read_text()
    assert log.count("reward model 'mine' has another tokenizer than the policy") == 1
    assert run.metrics[-1]["reward/mine"] == pytest.approx(run.metrics[-1]["reward/mean"])


def test_a_response_too_long_for_another_tokenizer_is_a_failed_reward(tmp_path: Path) -> None:
    """Stop: the responses are saved, and used once there is room. Drop: they are unscorable, the others are not."""
    pieces = train_bpe(["a"], 258)  # a token a byte, so that what is twelve words is at times beyond 92
    source = save_scorer(tmp_path / "mine", pieces, context=92)
    given = config(tmp_path, {"model": str(source)}, rollout={**AGAINST_IT["rollout"], "max_new_tokens": 12})
    with pytest.raises(
        RewardError, match=r"reward model 'mine', response to .* its context is 92: lower rollout"
    ):
        kedge.train(given)
    run = tmp_path / "run" / "grpo"
    assert [each.name for each in (run / "checkpoints").iterdir()] == ["step-000000.update-000"]
    drop = {**given["stages"][0]["rewards"], "on_error": "drop"}
    again = {**given, "stages": [{**given["stages"][0], "rewards": drop}], "resume": True}
    found = kedge.train(again).stages["grpo"].metrics
    assert [row["step"] for row in found] == [1, 2]
    assert all(0 < row["reward/unscorable_fraction"] < 1 for row in found)


def test_a_stop_string_ends_a_response_for_the_reward_model(tmp_path: Path) -> None:
    """What training asks for a score is the response with an end token, where no end was drawn."""
    source = save_scorer(tmp_path / "mine")
    rollout = {**AGAINST_IT["rollout"], "stop": ["e"], "truncated": "mask"}
    run = kedge.train(
        config(tmp_path, {"model": str(source)}, rollout=rollout, evaluation=AGAINST_IT["evaluation"])
    ).stages["grpo"]
    scorer = AutoModelForSequenceClassification.from_pretrained(source).double()
    by_stop_string = 0
    for sample in run.samples:
        ids = [WORDS.convert_tokens_to_ids(token) for token in sample["tokens"]]
        by_stop_string += sample["finished"] and ids[-1] != 1
        ended = [1] if sample["finished"] and ids[-1] != 1 else []
        whole = torch.tensor([[*WORDS.encode(sample["prompt"]), *ids, *ended]])
        score = float(scorer(input_ids=whole).logits.detach())
        assert sample["reward"] == pytest.approx(score, abs=1e-4)
    assert by_stop_string > 0


def test_the_chain(tmp_path: Path) -> None:
    """SFT, reward model, GRPO: the policy goes on from SFT, and is rewarded by what the reward stage left."""
    sft = {**SFT, "data": {"task": "prose", "count": 64}, "evaluation": None}
    result = kedge.train(recipe(tmp_path, sft, REWARD, AGAINST_IT, model=PROSE))
    scores, grpo = result.stages["scores"], result.stages["grpo"]
    assert grpo.metrics[0]["eval/kl/policy_reference/exact"] == pytest.approx(0, abs=1e-9)
    start = AutoModelForCausalLM.from_pretrained(result.stages["sft"].model)
    scorer = AutoModelForSequenceClassification.from_pretrained(scores.model)
    assert json.loads((grpo.path / "environment.json").read_text())["reference"] == fingerprint(start)
    for state in (grpo.path / "checkpoints").glob("step-*/state.json"):
        assert fingerprint(scorer) in state.read_text()
    sample = grpo.samples[-1]
    ids = WORDS.encode(sample["prompt"]) + [WORDS.convert_tokens_to_ids(token) for token in sample["tokens"]]
    score = float(scorer(input_ids=torch.tensor([ids])).logits.detach())
    assert sample["rewards"]["scores"] == pytest.approx(score, abs=1e-4)


def test_resumed_to_the_last_bit(tmp_path: Path) -> None:
    """Stopped in the reward stage and in the stage that uses it: the same numbers as without."""
    traced = []
    for name in ("whole", "stopped"):
        folder = tmp_path / name
        folder.mkdir()
        stages = [dict(REWARD), dict(AGAINST_IT)]
        if name == "stopped":
            for early in ([{**REWARD, "steps": 2}], [REWARD, {**AGAINST_IT, "steps": 2}]):
                kedge.train(recipe(folder, *early, model=PROSE, resume=len(early) > 1))
        kedge.train(recipe(folder, *stages, model=PROSE, resume=name == "stopped"))
        traced.append([without_clock(read_metrics(folder / "run" / each["name"])) for each in stages])
    assert repr(traced[0]) == repr(traced[1])


def test_a_changed_reward_model_is_refused(tmp_path: Path) -> None:
    for seed in (1, 2):
        source = save_scorer(tmp_path / "mine", seed=seed)
        changed = config(tmp_path, {"model": str(source)}, steps=2 * seed)
        if seed == 1:
            kedge.train(changed)
    with pytest.raises(UserError, match="the reward model 'mine' is not the one this run began with"):
        kedge.train({**changed, "resume": True})


def several_labels(folder: Path) -> dict[str, Any]:
    return {"model": str(save_scorer(folder / "many", labels=3))}


def language_model(folder: Path) -> dict[str, Any]:
    model = build_model(len(WORDS), hidden_size=16, layers=1, heads=2, context=96)
    save_model(model, WORDS, folder / "policy")
    return {"model": str(folder / "policy")}


def without_tokenizer(folder: Path) -> dict[str, Any]:
    place = save_scorer(folder / "bare")
    for file in place.glob("*token*"):
        file.unlink()
    return {"model": str(place)}


def foreign_tokenizer(folder: Path) -> dict[str, Any]:
    place = save_scorer(folder / "foreign", train_bpe(["a b"], 258))
    WORDS.save_pretrained(place)
    return {"model": str(place)}


def short_context(folder: Path) -> dict[str, Any]:
    return {"model": str(save_scorer(folder / "short", context=8))}


BAD: dict[str, tuple[Any, str]] = {
    "missing path": (
        lambda folder: {"model": "./nowhere"},
        "reward model './nowhere': there is no such folder",
    ),
    "several labels": (several_labels, "has 3 labels, and a reward is one number"),
    "a language model": (language_model, "is a LlamaForCausalLM, not a sequence classifier"),
    "no tokenizer": (without_tokenizer, "the folder has no tokenizer files"),
    "tokenizer of another model": (foreign_tokenizer, "has 258 embeddings: use the tokenizer that belongs"),
    "short context": (short_context, "has a context of 8 tokens, and prompt and response can have 11"),
}


@pytest.mark.parametrize(("make", "expected"), BAD.values(), ids=BAD.keys())
def test_bad_reward_models(make: Any, expected: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        kedge.train(config(tmp_path, make(tmp_path)))
    assert expected in str(caught.value)
