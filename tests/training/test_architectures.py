"""Training runs on real architectures, and what is saved is what was trained."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import kedge
from kedge.errors import UserError
from kedge.models import build_model, fingerprint, save_model
from kedge.rollout import SamplingConfig, generate
from kedge.tasks import sums
from kedge.training.checkpoint import restore_weights
from tests.training.small import GRPO, SFT, recipe

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},
    "gemma2": {"options": {"sliding_window": 8, "final_logit_softcapping": 5.0}},
    "gpt2": {},
    "mistral": {"options": {"sliding_window": 8}},
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_trains_saves_and_loads(architecture: str, tmp_path: Path) -> None:
    tokenizer = sums.tokenizer()
    model = build_model(
        len(tokenizer),
        architecture=architecture,
        hidden_size=32,
        layers=2,
        heads=2,
        context=48,
        pad_id=0,
        eos_id=1,
        **ARCHITECTURES[architecture],
    )
    config = recipe(tmp_path, {**GRPO, "steps": 2, "epochs": 2})
    del config["model"]
    run = kedge.train(config, model=model, tokenizer=tokenizer).stages["grpo"]
    assert all(math.isfinite(row["loss"]) for row in run.metrics[1:])
    assert run.metrics[1]["check/kl_policy_reference"] < 1e-6
    assert run.metrics[1]["check/sampler_log_prob_error_max"] < 1e-4
    saved = AutoModelForCausalLM.from_pretrained(run.model).eval()
    again = AutoTokenizer.from_pretrained(run.model)
    prompt = again("12+34=", return_tensors="pt")["input_ids"]
    theirs = saved.generate(prompt, max_new_tokens=8, do_sample=False, pad_token_id=0)[0, prompt.shape[1] :]
    sampling = SamplingConfig(responses_per_prompt=1, max_new_tokens=8, temperature=0.0)
    ours = generate(model, tokenizer, prompt.tolist(), sampling, torch.Generator()).responses()[0]
    assert again.decode(theirs, skip_special_tokens=True) == tokenizer.decode(ours, skip_special_tokens=True)


RENAMED: dict[str, dict[str, Any]] = {
    "gpt_neox": {},
    "mixtral": {"num_local_experts": 4, "num_key_value_heads": 2},
    "qwen3_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "num_key_value_heads": 2,
    },
}
"""Written by transformers under the names, and in the pieces, of their first publication."""


def renamed(architecture: str, *, layers: int = 2, seed: int = 0) -> PreTrainedModel:
    sizes = {"vocab_size": len(sums.tokenizer()), "hidden_size": 32, "intermediate_size": 32}
    config = AutoConfig.for_model(
        architecture,
        **sizes,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=48,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
        **RENAMED[architecture],
    )
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.mark.parametrize("architecture", RENAMED)
def test_weights_that_are_saved_under_other_names_come_back(architecture: str, tmp_path: Path) -> None:
    saved, here = renamed(architecture), renamed(architecture, seed=1)
    save_model(saved, sums.tokenizer(), tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    with safe_open(str(file), framework="pt") as opened:
        assert not set(opened.keys()) <= set(saved.state_dict())
    state = torch.get_rng_state()
    restore_weights(here, tmp_path)
    assert fingerprint(here) == fingerprint(saved)
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(UserError, match="this is not the model that the run began with"):
        restore_weights(renamed(architecture, layers=1), tmp_path)


@pytest.mark.parametrize("architecture", ["gpt_neox", "mixtral"])
def test_stages_and_resumes_of_a_model_that_is_saved_under_other_names(
    architecture: str, tmp_path: Path
) -> None:
    prints = []
    for name, parts in (("whole", (4,)), ("halves", (2, 4))):
        (tmp_path / name).mkdir()
        for steps in parts:
            stages = ({**SFT, "steps": 2}, {**GRPO, "steps": steps})
            config = recipe(tmp_path / name, *stages, resume=steps != parts[0])
            del config["model"]
            model = renamed(architecture)
            kedge.train(config, model=model, tokenizer=sums.tokenizer())
        prints.append(fingerprint(model))
    assert prints[0] == prints[1]
