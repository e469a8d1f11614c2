"""Generation against teacher forcing, against transformers, and against itself."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM

from kedge.errors import UserError
from kedge.head import projection, score
from kedge.head.products import multiply
from kedge.head.projection import suits
from kedge.models import head_of, hidden_states
from kedge.rollout import SamplingConfig, cache, generate, inprocess
from kedge.rollout.cache import RolloutCache

SAMPLING = SamplingConfig(responses_per_prompt=3, max_new_tokens=12)
GREEDY = replace(SAMPLING, responses_per_prompt=1, temperature=0.0)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def forced(model, rollout, temperature=1.0, vocabulary=None):
    """Log-probabilities of the responses from one pass over whole sequences."""
    tokens, lengths = rollout.sequences()
    hidden = hidden_states(model, tokens, lengths)[rollout.predicting()]
    scores = score(
        hidden,
        head_of(model, vocabulary),
        rollout.response_tokens,
        want={"log_prob"},
        temperature=temperature,
    )
    return scores["log_prob"].detach()


def same(first, second):
    return all(torch.equal(value, second.state()[name]) for name, value in first.state().items())


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.5])
def test_log_probs_equal_a_teacher_forced_pass(make, tokenizer, prompts, architecture, temperature):
    model = make(architecture)
    rollout = generate(model, tokenizer, prompts, replace(SAMPLING, temperature=temperature), seeded())
    torch.testing.assert_close(
        rollout.sampler_log_probs, forced(model, rollout, temperature), atol=1e-5, rtol=0
    )


def test_log_probs_in_float64_are_exact(make, tokenizer, prompts):
    model = make().double()
    rollout = generate(model, tokenizer, prompts, SAMPLING, seeded())
    torch.testing.assert_close(rollout.sampler_log_probs, forced(model, rollout), atol=1e-10, rtol=0)


def test_bfloat16_models_draw_from_float32_logits(make, tokenizer, prompts):
    model = make().bfloat16()
    rollout = generate(model, tokenizer, prompts, SAMPLING, seeded())
    assert rollout.sampler_log_probs.dtype == torch.float32
    assert (rollout.sampler_log_probs - forced(model, rollout)).abs().mean() < 0.02


def test_under_autocast_the_backbone_follows_and_the_logits_do_not(make, tokenizer, prompts):
    model = make()
    one = SamplingConfig(responses_per_prompt=3, max_new_tokens=1)
    with torch.autocast("cpu", torch.bfloat16):
        rollout = generate(model, tokenizer, prompts, one, seeded())
        tokens, lengths = rollout.sequences()
        hidden = hidden_states(model, tokens, lengths)[rollout.predicting()]
    scores = score(hidden, head_of(model), rollout.response_tokens, want={"log_prob"})
    assert (hidden - hidden_states(model, tokens, lengths)[rollout.predicting()]).abs().max() > 1e-4
    torch.testing.assert_close(rollout.sampler_log_probs, scores["log_prob"].detach(), atol=1e-5, rtol=0)


def test_under_autocast_keys_are_kept_as_attention_reads_them(make, tokenizer, prompts, monkeypatch):
    """Rotated keys are float32, and attention would round the whole cache again at every token."""
    model, kept = make(), []
    expand = RolloutCache.expand

    def looking(self, copies, lengths):
        expand(self, copies, lengths)
        kept.append({room.dtype for layer in self.layers for room in (layer.key_room, layer.value_room)})

    monkeypatch.setattr(RolloutCache, "expand", looking)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = generate(model, tokenizer, prompts, SAMPLING, seeded())
        monkeypatch.setattr(cache, "_as_attention_reads", lambda states: states)
        whole = generate(model, tokenizer, prompts, SAMPLING, seeded())
    assert kept[0] == {torch.bfloat16}
    assert torch.float32 in kept[1]
    assert same(rounded, whole)


@pytest.mark.parametrize("norm", [torch.bfloat16, torch.float32])
def test_a_bfloat16_head_is_multiplied_as_it_is_on_a_gpu(make, tokenizer, prompts, norm, monkeypatch):
    """Followed on a CPU; the last norm of some models gives float32."""
    model = make().bfloat16()
    model.get_decoder().register_forward_hook(
        lambda _, __, output: output.__setitem__("last_hidden_state", output.last_hidden_state.to(norm))
    )
    expected = generate(model, tokenizer, prompts, SAMPLING, seeded())
    factors = []

    def counting(left, right, out, **options):
        factors.append(right.dtype)
        return multiply(left, right, out, **options)

    monkeypatch.setattr(projection, "multiply", counting)
    monkeypatch.setattr(inprocess, "suits", lambda _, *given: suits("cuda", *given))
    found = generate(model, tokenizer, prompts, SAMPLING, seeded())
    assert set(factors) == {norm}
    assert same(found, expected)


def test_greedy_log_probs_are_those_at_temperature_one(make, tokenizer, prompts):
    model = make()
    rollout = generate(model, tokenizer, prompts, GREEDY, seeded())
    torch.testing.assert_close(rollout.sampler_log_probs, forced(model, rollout), atol=1e-5, rtol=0)


def test_greedy_text_equals_that_of_transformers(make, tokenizer, prompts, architecture):
    model = make(architecture)
    responses = generate(model, tokenizer, prompts, GREEDY, seeded()).responses()
    for prompt, response in zip(prompts, responses, strict=True):
        output = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)
        assert response == output[0, len(prompt) :].tolist()


def test_prompts_together_equal_prompts_alone(make, tokenizer, prompts, architecture):
    model = make(architecture)
    together = generate(model, tokenizer, prompts, GREEDY, seeded()).responses()
    alone = [generate(model, tokenizer, [prompt], GREEDY, seeded()).responses()[0] for prompt in prompts]
    assert together == alone


def test_the_batch_size_changes_nothing(make, tokenizer, prompts, architecture):
    model = make(architecture)
    whole = generate(model, tokenizer, prompts, SAMPLING, seeded())
    for batch_size in (1, 3):
        split = generate(model, tokenizer, prompts, SAMPLING, seeded(), batch_size=batch_size)
        assert whole.responses() == split.responses()
        assert torch.equal(whole.group, split.group)


def test_equal_seeds_give_equal_rollouts_to_the_bit(make, tokenizer, prompts):
    model = make()
    first, second, other = (generate(model, tokenizer, prompts, SAMPLING, seeded(seed)) for seed in (4, 4, 5))
    assert same(first, second)
    assert first.responses() != other.responses()


def test_the_generator_moves_on_by_the_same_amount_whatever_is_drawn(make, tokenizer, prompts):
    states = []
    for spread in (0.2, 1.0):
        generator = seeded()
        generate(make(spread=spread), tokenizer, prompts, SAMPLING, generator)
        states.append(generator.get_state())
    assert torch.equal(*states)


def test_first_tokens_follow_the_policy(make, tokenizer):
    model = make(spread=0.5)
    count = 4000
    rollout = generate(model, tokenizer, [[70, 71, 72]], SamplingConfig(count, 1), seeded(7))
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([[70, 71, 72]])).logits[0, -1].double().softmax(-1) * count
    observed = torch.bincount(rollout.response_tokens, minlength=258).double()
    large = expected >= 5
    observed, expected = (torch.cat([each[large], each[~large].sum()[None]]) for each in (observed, expected))
    statistic = float(((observed - expected) ** 2 / expected).sum())
    freedom = len(expected) - 1
    assert freedom > 20
    assert abs(statistic - freedom) < 4 * (2 * freedom) ** 0.5  # mean and spread of chi-square


def test_responses_end_with_an_end_token_or_at_the_limit(make, tokenizer, prompts):
    model = make()
    model.generation_config.eos_token_id = [1, *range(100, 130)]
    rollout = generate(model, tokenizer, prompts, replace(SAMPLING, responses_per_prompt=16), seeded())
    ends = set(model.generation_config.eos_token_id)
    finished = 0
    for response, done in zip(rollout.responses(), rollout.finished.tolist(), strict=True):
        assert not ends & set(response[:-1])
        assert (response[-1] in ends) == done
        assert done or len(response) == 12
        finished += done
    assert 10 < finished < 64
    torch.testing.assert_close(rollout.sampler_log_probs, forced(model, rollout), atol=1e-5, rtol=0)
    assert rollout.mask.all()


def test_decoding_stops_with_the_last_response_and_drops_finished_rows(make, tokenizer, prompts):
    model = make()
    model.generation_config.eos_token_id = list(range(1, 60))
    rows = []
    model.model.register_forward_pre_hook(
        lambda _, args, given: rows.append(len(given["input_ids"])), with_kwargs=True
    )
    rollout = generate(model, tokenizer, prompts, replace(SAMPLING, max_new_tokens=30), seeded())
    assert rollout.finished.all()
    assert (
        len(rows) == rollout.response_lengths.max() < 30
    )  # the prompts, then a step for all tokens but the last
    assert rows[0] == len(prompts)
    assert rows[1] <= 12
    assert rows == [rows[0], *sorted(rows[1:], reverse=True)]
    assert rows[-1] < rows[1]


def test_each_prompt_is_read_once(make, tokenizer, prompts):
    model = make()
    read = []
    model.model.register_forward_pre_hook(
        lambda _, args, given: read.append(tuple(given["input_ids"].shape)), with_kwargs=True
    )
    generate(model, tokenizer, prompts, SAMPLING, seeded())
    assert read[0] == (4, 9)
    assert set(read[1:]) == {(12, 1)}


def test_end_tokens_wait_for_the_least_number_of_tokens(make, tokenizer, prompts):
    model = make()
    model.generation_config.eos_token_id = list(range(1, 250))
    sampling = replace(SAMPLING, responses_per_prompt=8, min_new_tokens=5)
    rollout = generate(model, tokenizer, prompts, sampling, seeded())
    assert rollout.response_lengths.min() == 6
    early = torch.cat([torch.arange(length) < 5 for length in rollout.response_lengths.tolist()])
    truth = forced(model, rollout)
    assert (rollout.sampler_log_probs[early] > truth[early]).all()  # renormalised over what could be drawn
    torch.testing.assert_close(rollout.sampler_log_probs[~early], truth[~early], atol=1e-5, rtol=0)


def test_stop_strings_end_a_response_and_stay_in_it(make, tokenizer, prompts):
    sampling = replace(SAMPLING, responses_per_prompt=32, stop=("e", "t", "a", "o", "né"))
    model = make(spread=0.02)
    rollout = generate(model, tokenizer, prompts, sampling, seeded())
    plain = generate(model, tokenizer, prompts, replace(sampling, stop=()), seeded())
    stopped = 0
    for response, unstopped, done in zip(
        rollout.responses(), plain.responses(), rollout.finished.tolist(), strict=True
    ):
        texts = [tokenizer.decode(response[: end + 1]) for end in range(len(response))]
        hits = [any(stop in text for stop in sampling.stop) for text in texts]
        assert not any(hits[:-1])
        assert done == (hits[-1] or response[-1] == 1)
        assert response == unstopped[: len(response)]
        stopped += hits[-1]
    assert stopped > 20


def test_a_stop_string_may_span_tokens(make, tokenizer):
    model = make()
    prompt = tokenizer.encode("abc")
    text = [
        tokenizer.decode([token])
        for token in generate(model, tokenizer, [prompt], GREEDY, seeded()).responses()[0]
    ]
    start = next(
        index for index in range(3, 10) if all("\ufffd" not in piece for piece in text[index : index + 2])
    )
    stop = "".join(text[start : start + 2])
    rollout = generate(model, tokenizer, [prompt], replace(GREEDY, stop=(stop,)), seeded())
    end = next(index for index in range(12) if stop in "".join(text[: index + 1]))
    assert rollout.response_lengths.tolist() == [end + 1]
    assert rollout.finished.all()


def test_rows_beyond_the_tokenizer_are_never_drawn(make, tokenizer, prompts):
    model = make(vocabulary=320)
    rollout = generate(model, tokenizer, prompts, replace(SAMPLING, responses_per_prompt=16), seeded())
    assert rollout.response_tokens.max() < 258
    truth = forced(model, rollout, vocabulary=258)
    torch.testing.assert_close(rollout.sampler_log_probs, truth, atol=1e-5, rtol=0)


def test_dropout_is_off_and_the_mode_comes_back(make, tokenizer, prompts):
    model = make("gpt2").train()
    rollout = generate(model, tokenizer, prompts, SAMPLING, seeded())
    assert all(module.training for module in model.modules())
    torch.testing.assert_close(rollout.sampler_log_probs, forced(model.eval(), rollout), atol=1e-5, rtol=0)


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_no_graph_is_built_and_any_guard_works(make, tokenizer, prompts, guard):
    model = make()
    with guard():
        rollout = generate(model, tokenizer, prompts, SAMPLING, seeded())
    assert not rollout.sampler_log_probs.requires_grad
    assert same(rollout, generate(model, tokenizer, prompts, SAMPLING, seeded()))


def test_a_rollout_can_be_trained_on(make, tokenizer, prompts):
    model = make()
    rollout = generate(model, tokenizer, prompts, SAMPLING, seeded())
    tokens, lengths = rollout.sequences()
    hidden = hidden_states(model, tokens, lengths)[rollout.predicting()]
    log_probs = score(hidden, head_of(model), rollout.response_tokens, want={"log_prob"})["log_prob"]
    (log_probs - rollout.sampler_log_probs).exp().sum().backward()
    assert model.get_input_embeddings().weight.grad.abs().max() > 0


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "no prompts"),
        ([[5], []], "prompt 1 is empty"),
        ([[5], [5, 258]], r"prompt 1 holds token 258.*has 258"),
        ([[-1]], "prompt 0 holds token -1"),
        ([[5], [5] * 37], r"prompt 1 has 37 tokens.*max_new_tokens = 12.*context of 48"),
    ],
)
def test_prompts_that_cannot_be_answered_are_named(make, tokenizer, prompts, message):
    with pytest.raises(UserError, match=message):
        generate(make(), tokenizer, prompts, SAMPLING, seeded())


def test_the_whole_context_can_be_used(make, tokenizer, architecture):
    model = make(architecture)
    rollout = generate(model, tokenizer, [[5] * 36, [6]], SAMPLING, seeded())
    torch.testing.assert_close(rollout.sampler_log_probs, forced(model, rollout), atol=1e-5, rtol=0)


def test_a_recurrent_model_is_refused(tokenizer):
    model = MambaForCausalLM(MambaConfig(vocab_size=258, hidden_size=8, num_hidden_layers=1, state_size=4))
    with pytest.raises(UserError, match=r"MambaForCausalLM keeps .* beside attention"):
        generate(model, tokenizer, [[5]], SAMPLING, seeded())
