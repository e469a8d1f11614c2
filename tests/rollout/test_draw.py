"""Drawing by the inverse of the cumulative distribution."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from kedge.rollout.draw import draw

LARGEST = 1 - 2**-53


@given(st.lists(st.floats(-8, 8), min_size=1, max_size=9), st.integers(0, 2**32))
def test_the_share_of_uniform_numbers_that_give_a_token_is_its_probability(logits, seed):
    row = torch.tensor(logits, dtype=torch.float64)
    count = 4000
    uniforms = (
        torch.arange(count, dtype=torch.float64)
        + torch.rand((), generator=torch.Generator().manual_seed(seed))
    ) / count
    tokens, log_probs = draw(row.repeat(count, 1), uniforms)
    shares = torch.bincount(tokens, minlength=len(row)) / count
    assert (shares - row.softmax(-1)).abs().max() < 2 / count
    torch.testing.assert_close(log_probs, row.log_softmax(-1)[tokens])


@given(
    st.lists(st.sampled_from([-math.inf, -100.0, 0.0, 3.0]), min_size=2, max_size=7), st.floats(0, LARGEST)
)
def test_a_forbidden_token_is_never_drawn(logits, uniform):
    row = torch.tensor([[*logits, 0.0, -math.inf]])
    for edge in (0.0, uniform, LARGEST):
        tokens, log_probs = draw(row.clone(), torch.tensor([edge], dtype=torch.float64))
        assert row[0, tokens[0]] > -math.inf
        assert log_probs.isfinite().all()


def test_improbable_tokens_keep_their_probability_to_the_end():
    row = torch.tensor([[0.0, -30.0, -math.inf]])
    probability = math.exp(-30) / (1 + math.exp(-30))
    edges = torch.tensor([0.0, probability * 0.99, probability * 1.01, 0.5, LARGEST], dtype=torch.float64)
    assert draw(row.repeat(5, 1), edges)[0].tolist() == [1, 1, 0, 0, 0]


def test_without_a_uniform_number_the_most_probable_token_is_taken():
    tokens, log_probs = draw(torch.tensor([[0.0, 2.0, 1.0], [3.0, 0.0, 0.0]]), None)
    assert tokens.tolist() == [1, 0]
    torch.testing.assert_close(log_probs[0].exp(), torch.tensor(math.e**2 / (1 + math.e + math.e**2)))


@given(st.integers(1, 1100), st.integers(0, 2**32))
def test_blocks_find_what_one_running_sum_in_float64_finds(vocabulary, seed):
    draws = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(16, vocabulary, dtype=torch.float64, generator=draws)
    logits[:, 1::7] = -math.inf
    uniforms = torch.rand(16, dtype=torch.float64, generator=draws)
    running = logits.softmax(-1).cumsum(-1)
    expected = (running < (1 - uniforms[:, None]) * running[:, -1:]).sum(-1)
    tokens, log_probs = draw(logits.clone(), uniforms)
    assert tokens.tolist() == expected.tolist()
    torch.testing.assert_close(log_probs, logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0])


def test_a_certain_token_does_not_swallow_an_improbable_one_of_another_block():
    row = torch.full((1, 700), -math.inf)
    row[0, 100], row[0, 600], row[0, 699] = 0.0, -30.0, -30.0
    edge = math.exp(-30)
    uniforms = torch.tensor([0.0, 0.9 * edge, 1.1 * edge, 1.9 * edge, 2.1 * edge], dtype=torch.float64)
    assert draw(row.repeat(5, 1), uniforms)[0].tolist() == [699, 699, 600, 600, 100]
