"""Padding, packing and running alone give the same hidden states."""

from __future__ import annotations

import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM

from kedge.errors import UserError
from kedge.head import score
from kedge.models import build_model, disable_dropout, enable_activation_checkpointing, head_of, hidden_states

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def one_by_one(model, tokens, lengths):
    rows = [
        model.get_decoder()(input_ids=row[None], use_cache=False).last_hidden_state[0]
        for row in split(tokens, lengths)
    ]
    return torch.cat(rows)


def split(tokens, lengths):
    return torch.split(tokens, lengths.tolist())


def assert_same(value, expected, relative=None):
    limit = (relative or TOLERANCE[expected.dtype]) * expected.abs().max().item()
    torch.testing.assert_close(value, expected, atol=limit, rtol=0)


# transformers computes the softmax of eager attention in float32 whatever the dtype: no float64 case for it
@pytest.mark.parametrize(
    ("attention", "dtype"), [("sdpa", torch.float64), ("sdpa", torch.float32), ("eager", torch.float32)]
)
def test_layouts_agree_with_sequences_run_alone(make, architecture, batch, attention, dtype):
    model = make(architecture, dtype, attention)
    tokens, lengths = batch
    with torch.no_grad():
        expected = one_by_one(model, tokens, lengths)
        assert_same(hidden_states(model, tokens, lengths), expected)
        assert_same(hidden_states(model, tokens, lengths, padding_side="left"), expected)
        assert_same(hidden_states(model, tokens, lengths, layout="packed"), expected)


@pytest.mark.parametrize("side", ["right", "left"])
def test_amount_of_padding_changes_nothing(make, architecture, batch, side):
    model = make(architecture, torch.float64, "sdpa")
    tokens, lengths = batch
    longer = torch.cat([tokens, torch.arange(31)]), torch.cat([lengths, torch.tensor([31])])
    with torch.no_grad():
        expected = hidden_states(model, tokens, lengths, padding_side=side)
        assert_same(hidden_states(model, *longer, padding_side=side)[: len(tokens)], expected)


def test_order_in_the_batch_changes_nothing(make, architecture, batch):
    model = make(architecture, torch.float64, "sdpa")
    tokens, lengths = batch
    with torch.no_grad():
        expected = hidden_states(model, tokens, lengths)
        backwards = hidden_states(model, torch.cat(split(tokens, lengths)[::-1]), lengths.flip(0))
    assert_same(torch.cat(split(backwards, lengths.flip(0))[::-1]), expected)


def test_gradients_agree_between_layouts(make, architecture, batch):
    tokens, lengths = batch
    gradients = []
    for options in ({}, {"padding_side": "left"}, {"layout": "packed"}):
        model = make(architecture, torch.float64, "sdpa")
        (hidden_states(model, tokens, lengths, **options) ** 2).sum().backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    assert gradients[0].abs().max() > 0
    for gradient in gradients[1:]:  # Gemma's norms compute in float32 whatever the dtype
        assert_same(gradient, gradients[0], relative=1e-6 if architecture == "gemma2" else None)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_score_equals_the_dense_computation_on_the_models_own_logits(make, architecture, batch, dtype):
    model = make(architecture, dtype)
    tokens, lengths = batch
    targets = tokens.roll(-1)
    with torch.no_grad():
        ours = score(
            hidden_states(model, tokens, lengths), head_of(model), targets, want={"log_prob", "entropy"}
        )
        logits = torch.cat([model(input_ids=row[None]).logits[0] for row in split(tokens, lengths)])
    log_probs = logits.log_softmax(-1)
    relative = (
        1e-6 if architecture == "gemma2" else None
    )  # whose softmax of attention is float32 in any dtype
    assert_same(ours["log_prob"], log_probs.gather(1, targets[:, None])[:, 0], relative)
    assert_same(ours["entropy"], -(log_probs.exp() * log_probs).sum(-1), relative)


def test_the_models_own_head_never_runs(make, batch):
    model = make("llama")

    def refuse(*_):
        raise AssertionError("the output head ran")

    model.lm_head.register_forward_pre_hook(refuse)
    for layout in ("padded", "packed"):
        hidden_states(model, *batch, layout=layout)


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_activation_checkpointing_keeps_values_and_gradients(make, architecture, batch, layout):
    results = []
    for checkpointing in (False, True):
        model = disable_dropout(make(architecture, torch.float64, "sdpa")).train()
        if checkpointing:
            enable_activation_checkpointing(model)
        hidden = hidden_states(model, *batch, layout=layout)
        (hidden**2).sum().backward()
        gradient = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
        results.append((hidden.detach(), gradient))
    for value, expected in zip(results[1], results[0], strict=True):
        assert torch.equal(value, expected)


def test_a_model_that_cannot_pack_is_refused_by_name():
    torch.manual_seed(0)
    model = BloomForCausalLM(BloomConfig(vocab_size=40, hidden_size=16, n_layer=1, n_head=2)).eval()
    tokens, lengths = torch.arange(9), torch.tensor([4, 5])
    with torch.no_grad():
        expected = one_by_one(model, tokens, lengths)
        assert_same(hidden_states(model, tokens, lengths), expected)
        assert_same(hidden_states(model, tokens, lengths, padding_side="left"), expected)
    with pytest.raises(UserError, match=r"BloomForCausalLM.*padded layout"):
        hidden_states(model, tokens, lengths, layout="packed")


def test_left_padding_where_it_would_be_nan_is_refused(make, batch):
    model = make("llama", torch.float64, "eager")
    with pytest.raises(UserError, match=r"eager attention in float64.*pad on the right"):
        hidden_states(model, *batch, padding_side="left")


def test_a_sequence_beyond_the_context_is_named():
    model = build_model(32, hidden_size=8, layers=1, heads=2, context=4, seed=0)
    with pytest.raises(UserError, match=r"sequence 1 has 5 tokens.*context of LlamaForCausalLM is 4"):
        hidden_states(model, torch.arange(8), torch.tensor([3, 5]))


@pytest.mark.parametrize("lengths", [[3, 4], [8, 0], []])
def test_lengths_that_do_not_fit_are_refused(lengths):
    model = build_model(32, hidden_size=8, layers=1, heads=2, context=16, seed=0)
    with pytest.raises(ValueError, match="add up"):
        hidden_states(model, torch.arange(8), torch.tensor(lengths, dtype=torch.long))
