"""Dropout off is off in training mode too, wherever an architecture keeps its rates."""

from __future__ import annotations

import pytest
import torch
from transformers import OPTConfig, OPTForCausalLM

from kedge.errors import UserError
from kedge.models import (
    build_model,
    disable_dropout,
    enable_activation_checkpointing,
    evaluating,
    hidden_states,
)

TOKENS, LENGTHS = torch.arange(1, 11), torch.tensor([4, 6])
SMALL = {"hidden_size": 16, "layers": 2, "heads": 2, "context": 16, "seed": 0}


def with_dropout(kind):
    if kind == "gpt2":
        return build_model(32, architecture="gpt2", **SMALL)
    if kind == "opt":  # keeps its rates as plain numbers on its modules
        sizes = {"vocab_size": 32, "hidden_size": 16, "ffn_dim": 32, "word_embed_proj_dim": 16}
        config = OPTConfig(
            **sizes, num_hidden_layers=2, num_attention_heads=2, attention_dropout=0.1, layerdrop=0.3
        )
        return OPTForCausalLM(config)
    return build_model(32, architecture=kind, **SMALL, options={"attention_dropout": 0.1})


@pytest.mark.parametrize("kind", ["gpt2", "opt", "llama", "qwen3", "gemma2", "mistral"])
def test_a_model_in_training_mode_agrees_with_itself(kind):
    model = with_dropout(kind).train()
    with torch.no_grad():
        assert not torch.equal(hidden_states(model, TOKENS, LENGTHS), hidden_states(model, TOKENS, LENGTHS))
        disable_dropout(model)
        first, second = hidden_states(model, TOKENS, LENGTHS), hidden_states(model, TOKENS, LENGTHS)
        assert torch.equal(first, second)
        assert torch.equal(first, hidden_states(model.eval(), TOKENS, LENGTHS))


def test_only_dropout_rates_are_touched():
    model = with_dropout("gpt2")
    before = model.config.to_dict()
    disable_dropout(model)
    after = model.config.to_dict()
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"attn_pdrop", "embd_pdrop", "resid_pdrop", "summary_first_dropout"}


def test_evaluation_mode_is_left_as_it_was_module_by_module():
    model = with_dropout("gpt2").train()
    model.transformer.h[0].eval()
    before = [module.training for module in model.modules()]
    with evaluating(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == before


@pytest.mark.parametrize("kind", ["gpt2", "opt", "llama", "qwen3", "gemma2", "mistral"])
@pytest.mark.parametrize("training", [False, True])
def test_activation_checkpointing_recomputes_in_backward_and_changes_nothing(kind, training):
    model = disable_dropout(with_dropout(kind)).train(training)
    hidden_states(model, TOKENS, LENGTHS).square().sum().backward()
    plain = [
        parameter.grad.clone() for parameter in model.get_decoder().parameters() if parameter.grad is not None
    ]
    model.zero_grad()
    enable_activation_checkpointing(model)
    calls = []
    layers = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    norm = next(
        module for name, module in layers[-1].named_modules() if "norm" in name.lower() or "ln" in name
    )
    norm.register_forward_pre_hook(lambda *_: calls.append(1))
    hidden = hidden_states(model, TOKENS, LENGTHS)
    assert all(module.training == training for module in model.modules())
    hidden.square().sum().backward()
    assert len(calls) == 2
    found = [parameter.grad for parameter in model.get_decoder().parameters() if parameter.grad is not None]
    for one, other in zip(plain, found, strict=True):
        torch.testing.assert_close(one, other)


def test_without_gradients_nothing_is_switched():
    model = enable_activation_checkpointing(disable_dropout(with_dropout("llama"))).eval()
    seen = []
    model.model.layers[0].mlp.register_forward_pre_hook(
        lambda *_: seen.append(model.model.layers[0].training)
    )
    with torch.no_grad():
        hidden_states(model, TOKENS, LENGTHS)
    assert seen == [False]


def test_an_architecture_without_checkpointing_is_named():
    class Plain(type(with_dropout("llama"))):
        supports_gradient_checkpointing = False

    with pytest.raises(UserError, match="Plain does not support activation checkpointing"):
        enable_activation_checkpointing(Plain(with_dropout("llama").config))
