"""Models and tokenizers made on the spot."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kedge.errors import UserError
from kedge.models import build_model, fingerprint, train_bpe

TEXTS = ["Natalia sold 48/2 = 24 clips in May.", "She sold 48 + 24 = 72 clips altogether.", "#### 72"] * 5
TOKENIZER = train_bpe(TEXTS, 300)


def test_equal_seeds_give_equal_weights_and_leave_the_global_state(architecture):
    state = torch.get_rng_state()
    first, second, other = (
        build_model(32, architecture=architecture, hidden_size=8, layers=1, heads=2, context=16, seed=seed)
        for seed in (0, 0, 1)
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert fingerprint(first) == fingerprint(second) != fingerprint(other)


def test_sizes_arrive(architecture):
    model = build_model(
        50,
        architecture=architecture,
        hidden_size=16,
        layers=3,
        heads=2,
        intermediate_size=20,
        context=24,
        tie=False,
        pad_id=3,
        eos_id=4,
        bos_id=5,
    )
    assert model(input_ids=torch.zeros(1, 24, dtype=torch.long)).logits.shape == (1, 24, 50)
    assert (
        sum(parameter.shape == (20, 16) or parameter.shape == (16, 20) for parameter in model.parameters())
        >= 6
    )
    assert model.lm_head.weight is not model.get_input_embeddings().weight
    assert (model.config.pad_token_id, model.config.eos_token_id, model.config.bos_token_id) == (3, 4, 5)
    assert model.generation_config.eos_token_id == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "sextant"}, "architecture = 'sextant' is not one of llama"),
        ({"heads": 3}, "hidden_size = 8 must be an even multiple of heads = 3"),
        ({"options": {"slidng_window": 4}}, "options.slidng_window"),
    ],
)
def test_what_cannot_be_built_is_explained(changes, message):
    sizes = {"hidden_size": 8, "layers": 1, "heads": 2, "context": 16, "seed": 0}
    with pytest.raises(UserError, match=message):
        build_model(32, **{**sizes, **changes})


@given(st.text(max_size=40))
def test_every_text_comes_back(text):
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


def test_digits_stand_alone():
    pieces = [TOKENIZER.decode([token]) for token in TOKENIZER.encode("48 + 24 = 72")]
    assert all(len(piece) == 1 for piece in pieces if any(letter.isdigit() for letter in piece))


def test_training_is_repeatable_and_keeps_to_its_size():
    again = train_bpe(iter(TEXTS), 300)
    assert again.get_vocab() == TOKENIZER.get_vocab()
    assert len(again) <= 300
    assert [again.encode("clips altogether")] == [TOKENIZER.encode("clips altogether")]


def test_a_size_without_room_for_the_bytes_is_refused():
    with pytest.raises(UserError, match=r"vocab_size = 257.*at least 258"):
        train_bpe(TEXTS, 257)
