"""Training runs on real architectures, and what is saved is what was trained."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import kedge
from kedge.models import build_model
from kedge.rollout import SamplingConfig, generate
from kedge.tasks import sums
from tests.training.small import GRPO, recipe

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
