"""A prompt that is read once gives the hidden states and gradients of one that is read for every response."""

from __future__ import annotations

import pytest
import torch
from transformers import RwkvConfig, RwkvForCausalLM

from kedge.errors import UserError
from kedge.models import (
    context_length,
    disable_dropout,
    enable_activation_checkpointing,
    frozen_copy,
    hidden_states,
    response_states,
    shared_prompts,
    shares_prompts,
)
from kedge.rollout import Rollout

TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5}


def rollout(prompts: list[int], responses: list[int], group: list[int]) -> Rollout:
    """Random tokens of these lengths."""
    generator = torch.Generator().manual_seed(2)
    prompt_tokens, response_tokens = (
        torch.randint(0, 67, (sum(each),), generator=generator) for each in (prompts, responses)
    )
    return Rollout(
        prompt_tokens=prompt_tokens,
        prompt_lengths=torch.tensor(prompts),
        response_tokens=response_tokens,
        response_lengths=torch.tensor(responses),
        group=torch.tensor(group),
        mask=torch.ones(sum(responses), dtype=torch.bool),
        sampler_log_probs=torch.zeros(sum(responses)),
        finished=torch.ones(len(responses), dtype=torch.bool),
    )


BATCHES = {
    "uneven": rollout([7, 1, 4], [5, 2, 9, 1, 6], [0, 0, 1, 2, 2]),
    "even prompts": rollout([6, 6], [3, 8, 8, 5], [0, 0, 1, 1]),
    "out of order": rollout([2, 9], [3, 4, 5], [1, 0, 1]),
    "one token each": rollout([3, 5], [1, 1, 1], [0, 0, 1]),
}


def shared(model, batch):
    return response_states(
        model,
        batch.prompt_tokens,
        batch.prompt_lengths,
        batch.response_tokens,
        batch.response_lengths,
        batch.group,
    )


def again(model, batch):
    return hidden_states(model, *batch.sequences())[batch.predicting()]


def close(value, expected, relative):
    torch.testing.assert_close(value, expected, atol=relative * float(expected.abs().max()), rtol=0)


# transformers computes the softmax of eager attention in float32 whatever the dtype: no float64 case for it
@pytest.mark.parametrize(
    ("attention", "dtype"), [("sdpa", torch.float64), ("sdpa", torch.float32), ("eager", torch.float32)]
)
@pytest.mark.parametrize("name", BATCHES)
def test_states_and_gradients_are_the_same(make, architecture, name, attention, dtype):
    model, batch = make(architecture, dtype, attention), BATCHES[name]
    assert shares_prompts(model)
    found = []
    for states in (shared, again):
        hidden = states(model, batch)
        hidden.backward(torch.randn(hidden.shape, dtype=dtype, generator=torch.Generator().manual_seed(4)))
        found.append((hidden.detach(), [each.grad for each in model.get_decoder().parameters()]))
        model.zero_grad(set_to_none=True)
    close(found[0][0], found[1][0], TOLERANCE[dtype])
    for gradient, expected in zip(found[0][1], found[1][1], strict=True):  # norms compute in float32
        close(gradient, expected, 1e-5 if dtype == torch.float64 else 1e-4)


def test_each_prompt_is_read_once_and_last_tokens_never(make):
    model, seen = make("llama"), []
    model.get_decoder().register_forward_pre_hook(
        lambda _, __, given: seen.append(given["input_ids"].shape), with_kwargs=True
    )
    shared(model, BATCHES["uneven"])
    assert seen == [(3, 7), (5, 8)]


def test_a_model_that_recomputes_activations_does_not_share(make):
    model = disable_dropout(make("llama"))
    assert shares_prompts(model)
    assert not shares_prompts(enable_activation_checkpointing(model))
    with torch.no_grad():  # as a reference scores, where nothing is computed again
        assert shares_prompts(frozen_copy(model))


def test_a_recurrent_model_does_not_share():
    model = RwkvForCausalLM(RwkvConfig(vocab_size=16, hidden_size=8, num_hidden_layers=2))
    assert not shares_prompts(model)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_a_model_whose_rotations_change_with_the_length_does_not_share(make, kind):
    model = make("llama")
    model.config.rope_parameters = {**model.config.rope_parameters, "rope_type": kind}
    assert not shares_prompts(model)
    model = make("llama")
    model.config.rope_parameters = {"full_attention": {"rope_type": kind}}  # a kind for each kind of layer
    assert not shares_prompts(model)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_context_is_kept_to(make, name):
    """All of it can be used, whatever padding stands beside; one token more is refused."""
    model = make(name)
    context = context_length(model)
    batch = rollout([context - 1, 1], [1, context - 1], [0, 1])
    close(shared(model, batch).detach(), again(model, batch).detach(), 2e-5)
    with pytest.raises(UserError, match=f"sequence 1 has {context + 1} tokens"):
        shared(model, rollout([1, 5], [1, context - 4], [0, 1]))


def test_a_model_that_must_prove_it_and_cannot_does_not_share(make, monkeypatch):
    right = shared_prompts.to_the_end

    def forgetful(filled, group, lengths):
        return right(filled[:, :, :1].expand_as(filled), group, lengths)  # the first token alone

    monkeypatch.setattr(shared_prompts, "to_the_end", forgetful)
    model = make("llama")
    assert not shares_prompts(model)
    monkeypatch.undo()
    assert not shares_prompts(model)  # it is asked once
    assert shares_prompts(make("llama"))


def test_a_model_that_refuses_a_cache_does_not_share(make):
    model = make("llama")

    def refuse(_, __, given):
        if given.get("past_key_values") is not None:
            raise TypeError("forward() got an unexpected keyword argument 'past_key_values'")

    model.get_decoder().register_forward_pre_hook(refuse, with_kwargs=True)
    with pytest.warns(
        UserWarning, match="LlamaForCausalLM does not go on .*TypeError: .* unexpected keyword argument"
    ):
        assert not shares_prompts(model)
    assert again(model, BATCHES["uneven"]).isfinite().all()


def test_memory_that_runs_out_is_no_verdict(make, monkeypatch):
    def exhausted(model):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(shared_prompts, "_agrees", exhausted)
    with pytest.raises(torch.OutOfMemoryError):
        shares_prompts(make("llama"))
