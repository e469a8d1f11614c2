"""Special tokens and the usable vocabulary, and their absence."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from kedge.errors import UserError
from kedge.models import build_model, context_length, special_tokens, usable_vocabulary


def tokenizer_with(size=8, **special):
    words = {f"w{number}": number for number in range(size)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")), **special
    )


def model_with(vocabulary=8, **special):
    return build_model(vocabulary, hidden_size=8, layers=1, heads=2, context=16, seed=0, **special)


def test_the_tokenizer_speaks_first_and_the_model_adds():
    model = model_with(eos_id=5)
    model.generation_config.eos_token_id = [5, 6]
    assert special_tokens(model, tokenizer_with(eos_token="w3", pad_token="w2")) == (2, (3, 5, 6))


def test_the_model_alone_is_enough():
    assert special_tokens(model_with(eos_id=5, pad_id=4), tokenizer_with()) == (4, (5,))


def test_a_missing_pad_token_is_replaced_by_the_end_token():
    assert special_tokens(model_with(), tokenizer_with(eos_token="w3")) == (3, (3,))


def test_a_missing_end_token_is_an_error_with_its_remedy():
    with pytest.raises(UserError, match=r"end-of-text token.*set tokenizer\.eos_token"):
        special_tokens(model_with(), tokenizer_with(pad_token="w2"))


def test_a_special_token_outside_the_model_is_an_error():
    with pytest.raises(UserError, match=r"eos token has id 8.*8 rows"):
        special_tokens(model_with(), tokenizer_with(9, eos_token="w8"))


def test_usable_vocabulary():
    assert usable_vocabulary(model_with(8), tokenizer_with(8)) is None
    assert usable_vocabulary(model_with(16), tokenizer_with(8)) == 8
    with pytest.raises(UserError, match=r"ids go up to 8.*8 rows"):
        usable_vocabulary(model_with(8), tokenizer_with(9))


def test_a_token_added_later_counts():
    model, tokenizer = model_with(16), tokenizer_with(8)
    assert usable_vocabulary(model, tokenizer) == 8
    tokenizer.add_tokens(["new"])
    assert usable_vocabulary(model, tokenizer) == 9


def test_context_length_of_every_architecture(make, architecture):
    assert context_length(make(architecture)) == 32
