"""A score depends on its own sequence alone, and is the one that transformers gives."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification

from kedge.errors import RunError, UserError
from kedge.models import (
    build_model,
    fingerprint,
    load_reward_model,
    reward_model_from,
    save_model,
    sequence_scores,
    verify_scores,
)

LAYOUTS = ("padded", "packed")


def close(found, expected, model):
    """In float64, but for the attention of Gemma 2, whose softmax transformers takes in float32."""
    limit = 1e-6 if model.config.model_type == "gemma2" else 1e-12
    torch.testing.assert_close(found, expected.to(found.dtype), rtol=0, atol=limit)


@pytest.fixture
def model(make, architecture):
    return reward_model_from(make(architecture, torch.float64), seed=0, pad_id=0, end_ids=(1,))


def one_by_one(model, tokens, lengths):
    parts = torch.split(tokens, lengths.tolist())
    return torch.cat([sequence_scores(model, part, torch.tensor([len(part)])) for part in parts])


@torch.no_grad()
def test_padding_order_and_batch_size_do_not_matter(model, batch):
    tokens, lengths = batch
    expected = one_by_one(model, tokens, lengths)
    assert expected.std() > 0.05
    for layout in LAYOUTS:
        close(sequence_scores(model, tokens, lengths, layout=layout), expected, model)
    parts = torch.split(tokens, lengths.tolist())
    order = [2, 0, 3, 1]
    turned = sequence_scores(model, torch.cat([parts[i] for i in order]), lengths[order])
    close(turned, expected[order], model)


@torch.no_grad()
def test_they_are_those_of_transformers(model, batch):
    tokens, lengths = batch
    tokens = torch.where(tokens == 0, 2, tokens)  # transformers tells padding by its id
    theirs = [model(input_ids=part[None]).logits[0, 0] for part in torch.split(tokens, lengths.tolist())]
    close(sequence_scores(model, tokens, lengths), torch.stack(theirs).double(), model)
    padded = torch.nn.utils.rnn.pad_sequence(torch.split(tokens, lengths.tolist()), batch_first=True)
    batched = model(input_ids=padded).logits[:, 0]
    close(batched, torch.stack(theirs), model)


@torch.no_grad()
def test_float32(make, architecture, batch):
    tokens, lengths = batch
    model = reward_model_from(make(architecture), seed=0, pad_id=0)
    together, alone = sequence_scores(model, tokens, lengths), one_by_one(model, tokens, lengths)
    assert (together - alone).abs().max() < 1e-5


@torch.no_grad()
def test_bfloat16_arithmetic_leaves_scores_in_float32(make, batch):
    tokens, lengths = batch
    model = reward_model_from(make("llama"), seed=0, pad_id=0)
    with torch.autocast("cpu", torch.bfloat16):
        scores = sequence_scores(model, tokens, lengths)
    assert scores.dtype == torch.float32
    assert (scores - sequence_scores(model, tokens, lengths)).abs().max() < 0.1
    assert len(scores.bfloat16().float().sub(scores).abs().nonzero()) > 0


def test_the_backbone_is_a_copy_of_the_policys(make, architecture):
    policy = make(architecture)
    before = fingerprint(policy)
    model = reward_model_from(policy, seed=0, pad_id=0)
    theirs, ours = policy.get_decoder().state_dict(), model.get_decoder().state_dict()
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert fingerprint(policy) == before


def test_the_head_depends_on_its_seed_alone(make):
    policy = make("llama")
    state = torch.get_rng_state()
    heads = [reward_model_from(policy, seed=seed, pad_id=0).score.weight for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    wide = build_model(16, hidden_size=1024, layers=1, heads=2, context=16)
    assert float(reward_model_from(wide, seed=0, pad_id=0).score.weight.detach().std()) == pytest.approx(
        1025**-0.5, rel=0.1
    )


@torch.no_grad()
def test_a_padding_token_that_ends_responses_is_not_named(make, batch):
    tokens, lengths = batch
    tokens = tokens.clone()
    tokens[lengths.cumsum(0) - 1] = 1
    model = reward_model_from(make("llama", torch.float64), seed=0, pad_id=1, end_ids=(1,))
    assert model.config.pad_token_id is None
    theirs = [model(input_ids=part[None]).logits[0, 0] for part in torch.split(tokens, lengths.tolist())]
    close(sequence_scores(model, tokens, lengths), torch.stack(theirs).double(), model)


@torch.no_grad()
def test_saved_and_loaded(make, architecture, batch, tmp_path):
    tokens, lengths = batch
    model = reward_model_from(make(architecture), seed=0, pad_id=0)
    save_model(model, None, tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert loaded.config.num_labels == 1
    ours = load_reward_model(tmp_path)
    verify_scores(ours)
    assert fingerprint(ours) == fingerprint(loaded) == fingerprint(model)
    assert torch.equal(sequence_scores(ours, tokens, lengths), sequence_scores(model, tokens, lengths))


def test_several_labels(make, tmp_path):
    config = make("llama").config
    config.num_labels = 3
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="has 3 labels, and a reward is one number"):
        load_reward_model(tmp_path)


def test_a_language_model(make, tmp_path):
    save_model(make("gpt2"), None, tmp_path)
    with pytest.raises(UserError, match="is a GPT2LMHeadModel, not a sequence classifier"):
        load_reward_model(tmp_path)


def test_an_encoder(tmp_path):
    config = BertConfig(
        vocab_size=32,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        num_labels=1,
    )
    BertForSequenceClassification(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="on a causal backbone"):
        verify_scores(load_reward_model(tmp_path))


@torch.no_grad()
def test_a_model_that_looks_ahead(make):
    """The check of causality can fail: a backbone whose attention is not masked."""
    model = reward_model_from(make("llama"), seed=0, pad_id=0)
    backbone, real = model.model, model.model.forward

    def shifted(*args, **options):
        output = real(*args, **options)
        output.last_hidden_state = output.last_hidden_state + output.last_hidden_state.mean(1, keepdim=True)
        return output

    backbone.forward = shifted
    with pytest.raises(
        UserError, match="does not score a sequence by the hidden state of its last token alone"
    ):
        verify_scores(model)


@pytest.mark.parametrize("source", ["./absent", "/absent/model", "two words"])
def test_a_missing_folder(source):
    with pytest.raises(UserError, match=r"reward model .* there is no such folder"):
        load_reward_model(source)


def test_damaged_weights(make, tmp_path):
    save_model(reward_model_from(make("llama"), seed=0, pad_id=0), None, tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    with pytest.raises(RunError, match="its safetensors file is damaged"):
        load_reward_model(tmp_path)
