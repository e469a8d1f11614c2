"""The critic beside the model it starts from: the same hidden states, and values that never see their token."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

from kedge.errors import UserError
from kedge.models import (
    build_model,
    critic_beside,
    fingerprint,
    hidden_states,
    load_critic,
    reward_model_of,
    save_model,
    sequence_scores,
)
from kedge.rollout import Rollout

ARCHITECTURES = ("llama", "qwen3", "gemma2", "gpt2", "mistral")


def model(architecture: str = "llama", seed: int = 0) -> PreTrainedModel:
    return build_model(
        32, architecture=architecture, hidden_size=16, layers=2, heads=2, context=16, seed=seed, pad_id=0
    )


def reward_model(folder: Path, architecture: str, labels: int = 1) -> PreTrainedModel:
    """A sequence classifier of transformers' own, saved."""
    config = AutoConfig.for_model(**{**model(architecture).config.to_dict(), "num_labels": labels})
    torch.manual_seed(1)
    made = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32).eval()
    save_model(made, None, folder)
    return made


def rollout(response: list[int]) -> Rollout:
    count = len(response)
    return Rollout(
        prompt_tokens=torch.tensor([5, 6, 7]),
        prompt_lengths=torch.tensor([3]),
        response_tokens=torch.tensor(response),
        response_lengths=torch.tensor([count]),
        group=torch.tensor([0]),
        mask=torch.ones(count, dtype=torch.bool),
        sampler_log_probs=torch.zeros(count),
        finished=torch.tensor([True]),
    )


@torch.no_grad()
def test_a_value_does_not_know_the_token_after_it() -> None:
    critic = critic_beside(model(), shared=False)
    critic.head.weight.copy_(torch.randn(1, 16, generator=torch.Generator().manual_seed(2)))
    values = []
    for response in ([8, 9, 10, 11], [8, 9, 20, 11]):
        drawn = rollout(response)
        tokens, lengths = drawn.sequences()
        assert critic.backbone is not None
        values.append(critic(hidden_states(critic.backbone, tokens, lengths)[drawn.predicting()]))
    assert torch.equal(values[0][:3], values[1][:3])
    assert float((values[0][3] - values[1][3]).abs()) > 1e-4


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_training_the_critic_leaves_the_policy_alone(architecture: str) -> None:
    policy = model(architecture)
    before = fingerprint(policy)
    critic = critic_beside(policy, shared=False)
    assert critic.backbone is not None
    torch.nn.init.normal_(critic.head.weight, generator=torch.Generator().manual_seed(2))
    optimizer = torch.optim.SGD(critic.parameters(), lr=0.1)
    tokens, lengths = torch.tensor([5, 6, 7, 8]), torch.tensor([4])
    critic(hidden_states(critic.backbone, tokens, lengths)).square().sum().backward()
    optimizer.step()
    assert fingerprint(policy) == before
    with torch.no_grad():
        moved = hidden_states(critic.backbone, tokens, lengths) - hidden_states(policy, tokens, lengths)
    assert float(moved.abs().max()) > 1e-3
    names = {name for name, parameter in critic.named_parameters() if parameter.grad is not None}
    assert names == {name for name, _ in critic.named_parameters()}


def test_a_shared_critic_is_its_head_alone() -> None:
    critic = critic_beside(model(), shared=True)
    assert {name for name, _ in critic.named_parameters()} == {"head.weight"}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_reward_model_s_score_is_the_first_value(architecture: str, tmp_path: Path) -> None:
    """Beside transformers' own forward pass, which scores the last token."""
    theirs = reward_model(tmp_path, architecture)
    critic = load_critic(tmp_path)
    assert critic.backbone is not None
    tokens = torch.tensor([5, 6, 7, 8, 9])
    with torch.no_grad():
        expected = [float(theirs(input_ids=tokens[None, :end]).logits) for end in range(1, 6)]
        found = critic(hidden_states(critic.backbone, tokens, torch.tensor([5])))
    assert found.tolist() == pytest.approx(expected, abs=1e-5)


def test_a_language_model_gives_its_backbone(tmp_path: Path) -> None:
    save_model(model(seed=3), None, tmp_path)
    critic = load_critic(tmp_path)
    assert critic.backbone is not None
    tokens, lengths = torch.tensor([5, 6, 7]), torch.tensor([3])
    assert torch.equal(
        hidden_states(critic.backbone, tokens, lengths), hidden_states(model(seed=3), tokens, lengths)
    )
    assert critic(hidden_states(critic.backbone, tokens, lengths)).tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_critic_is_saved_as_a_reward_model(architecture: str, tmp_path: Path) -> None:
    """It comes back to the bit, and the score of a text is the value of the state after it."""
    critic = critic_beside(model(architecture), shared=False)
    torch.nn.init.normal_(critic.head.weight, generator=torch.Generator().manual_seed(2))
    saved = reward_model_of(critic, pad_id=0, end_ids=(1,))
    save_model(saved, None, tmp_path)
    back = load_critic(tmp_path)
    assert all(torch.equal(value, back.state_dict()[name]) for name, value in critic.state_dict().items())
    tokens, lengths = torch.tensor([5, 6, 7, 8]), torch.tensor([4])
    assert critic.backbone is not None
    with torch.no_grad():
        value = critic(hidden_states(critic.backbone, tokens, lengths))[-1]
        assert float(sequence_scores(saved, tokens, lengths)) == pytest.approx(float(value), abs=1e-6)


def test_several_labels_are_refused(tmp_path: Path) -> None:
    reward_model(tmp_path, "llama", labels=2)
    with pytest.raises(UserError, match="2 labels"):
        load_critic(tmp_path)


def test_values_are_never_below_float32() -> None:
    critic = critic_beside(model(), shared=True)
    torch.nn.init.ones_(critic.head.weight)
    hidden = torch.full((1, 16), 1.0 + 2**-7, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        value = critic(hidden)
    assert value.dtype == torch.float32
    assert value.item() == 16 * (1.0 + 2**-7)
