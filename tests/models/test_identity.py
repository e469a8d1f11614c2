"""The hash of a model's weights: what changes it and what does not."""

from __future__ import annotations

import pytest
import torch

from kedge.models import build_model, fingerprint, frozen_copy, load_model, save_model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_survives_saving_and_loading(make, architecture, tmp_path, dtype):
    model = make(architecture, dtype)
    save_model(model, None, tmp_path)
    assert fingerprint(load_model(tmp_path, dtype=dtype)) == fingerprint(model)


def test_it_survives_freezing_and_modes(make):
    model = make("llama")
    before = fingerprint(model)
    assert fingerprint(model.train().requires_grad_(False)) == before
    assert fingerprint(frozen_copy(model)) == before


def test_one_bit_of_any_weight_changes_it(make):
    model = make("gpt2")
    before = fingerprint(model)
    for parameter in model.parameters():
        bits = parameter.data.view(torch.int32).view(-1)
        bits[-1] ^= 1
        assert fingerprint(model) != before
        bits[-1] ^= 1
    assert fingerprint(model) == before


def test_dtype_and_names_change_it(make):
    marks = {fingerprint(make("llama", dtype)) for dtype in (torch.float32, torch.bfloat16)}
    marks.add(fingerprint(make("qwen3")))
    assert len(marks) == 3


def test_equal_bytes_of_another_dtype_or_shape_are_another_model(make):
    model = make("llama")
    for parameter in model.parameters():
        parameter.data.zero_()
    marks = {fingerprint(model.to(dtype)) for dtype in (torch.bfloat16, torch.float16)}
    model.model.layers[0].mlp.up_proj.weight.data = torch.zeros(32, 48, dtype=torch.float16)
    marks.add(fingerprint(model))
    assert len(marks) == 3


def test_a_tied_weight_counts_once_under_its_first_name():
    model = build_model(32, hidden_size=8, layers=1, heads=2, context=16, seed=0, tie=True)
    digest = fingerprint(model)
    model.lm_head = torch.nn.Linear(8, 32, bias=False)
    assert fingerprint(model) != digest
    model.lm_head.weight = model.model.embed_tokens.weight
    assert fingerprint(model) == digest


def test_a_saved_buffer_counts_and_a_passing_one_does_not(make):
    model = make("llama")
    before = fingerprint(model)
    model.register_buffer("scratch", torch.zeros(2), persistent=False)
    assert fingerprint(model) == before
    model.register_buffer("kept", torch.zeros(()))
    assert fingerprint(model) != before


def test_training_the_model_leaves_its_frozen_copy_as_it_was(make):
    model = make("llama").train()
    reference = frozen_copy(model)
    before = fingerprint(reference)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1
    assert fingerprint(reference) == before
    assert not reference.training
    assert all(module.training for module in model.modules())
    assert reference.lm_head.weight is reference.model.embed_tokens.weight
