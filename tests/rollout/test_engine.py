"""The packed rollout against plain Python lists."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kedge.errors import UserError
from kedge.rollout import Rollout, SamplingConfig, concatenate

TOKENS = st.lists(st.integers(0, 99), min_size=1, max_size=5)
PLAIN = st.lists(st.tuples(TOKENS, st.lists(TOKENS, min_size=1, max_size=3)), min_size=1, max_size=4)


def pack(plain):
    """A rollout from [(prompt, [response, …]), …]; log-probabilities and masks are told by the token."""
    prompts = [prompt for prompt, _ in plain]
    responses = [response for _, group in plain for response in group]
    flat = torch.tensor([token for response in responses for token in response])
    return Rollout(
        prompt_tokens=torch.tensor([token for prompt in prompts for token in prompt]),
        prompt_lengths=torch.tensor([len(prompt) for prompt in prompts]),
        response_tokens=flat,
        response_lengths=torch.tensor([len(response) for response in responses]),
        group=torch.tensor([index for index, (_, group) in enumerate(plain) for _ in group]),
        mask=flat % 3 > 0,
        sampler_log_probs=-flat.double(),
        finished=torch.tensor([response[-1] % 2 == 0 for response in responses]),
    )


def unpack(rollout):
    """[(prompt, response, mask, log-probabilities, finished), …], one for each response."""
    prompts = rollout.prompt_tokens.split(rollout.prompt_lengths.tolist())
    sizes = rollout.response_lengths.tolist()
    parts = [part.split(sizes) for part in (rollout.response_tokens, rollout.mask, rollout.sampler_log_probs)]
    return [
        (prompts[group].tolist(), *(part[index].tolist() for part in parts), rollout.finished[index].item())
        for index, group in enumerate(rollout.group.tolist())
    ]


@given(PLAIN)
def test_sequences_and_predicting_positions(plain):
    rollout = pack(plain)
    tokens, lengths = rollout.sequences()
    expected = [prompt + response for prompt, group in plain for response in group]
    assert [row.tolist() for row in tokens.split(lengths.tolist())] == expected
    assert torch.equal(tokens[rollout.predicting() + 1], rollout.response_tokens)
    starts = {sum(map(len, expected[:index])) for index in range(len(expected))}
    assert not starts & set((rollout.predicting() + 1).tolist())


@given(PLAIN, st.data())
def test_selection_keeps_responses_with_their_prompts(plain, data):
    rollout = pack(plain)
    count = len(rollout.group)
    chosen = data.draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=count, unique=True))
    selected = rollout.select(torch.tensor(chosen))
    rows = unpack(rollout)
    assert unpack(selected) == [rows[index] for index in chosen]
    kept = torch.unique(rollout.group[torch.tensor(chosen)]).tolist()
    assert [len(plain[index][0]) for index in kept] == selected.prompt_lengths.tolist()


@given(st.lists(PLAIN, min_size=1, max_size=3))
def test_concatenation_keeps_groups_apart(plains):
    joined = concatenate([pack(plain) for plain in plains])
    assert unpack(joined) == [row for plain in plains for row in unpack(pack(plain))]
    assert torch.equal(joined.group, pack([pair for plain in plains for pair in plain]).group)


@given(PLAIN)
def test_state_round_trip(plain):
    rollout = pack(plain)
    state = rollout.state()
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    again = Rollout.from_state(state).to("cpu")
    assert all(torch.equal(value, again.state()[name]) for name, value in state.items())


def test_nothing_to_concatenate():
    with pytest.raises(ValueError, match="no rollout"):
        concatenate([])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"responses_per_prompt": 0}, "responses_per_prompt = 0"),
        ({"max_new_tokens": 0}, "max_new_tokens = 0"),
        ({"temperature": -0.1}, "temperature = -0.1"),
        ({"temperature": float("nan")}, "temperature = nan"),
        ({"temperature": float("inf")}, "temperature = inf"),
        ({"min_new_tokens": 4}, "min_new_tokens = 4"),
        ({"stop": ("x", "")}, "empty string"),
    ],
)
def test_sampling_that_means_nothing_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        SamplingConfig(**{"responses_per_prompt": 1, "max_new_tokens": 4, **changes})
