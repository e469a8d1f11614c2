"""Texts of tokens: put together, they are the text, whatever the tokenizer does with spaces and bytes."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from kedge.measure.pieces import Pieces
from kedge.models import train_bpe

HOSTILE = [
    "plain words, and  two spaces ",
    "👩‍👩‍👧‍👦 family, 🇩🇪 flag, e\u0301 accent",
    "<script>alert(1)</script> &amp; \"quotes\" 'too'",
    "שלום עולם \u202eevil\u202c mixed",
    "control \x00\x07\x1b[31m red \r\n\ttab",
    "한국어 中文 ไทย",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_byte_level(text: str) -> None:
    tokenizer = train_bpe(["plain words and words"], 270)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = Pieces(tokenizer).of(ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_spaces_that_the_decoder_strips() -> None:
    """A decoder that drops the space of the first token, as those of SentencePiece vocabularies do."""
    made = Tokenizer(WordLevel({"▁the": 0, "▁cat": 1, "s": 2, "</s>": 3}))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>")
    assert tokenizer.decode([1]) == "cat"
    assert Pieces(tokenizer).of([0, 1, 2, 1]) == ["the", " cat", "s", " cat"]
    assert Pieces(tokenizer).of([0, 1, 3])[-1].strip() == "</s>"


def test_bytes_that_never_become_a_character() -> None:
    tokenizer = train_bpe(["ab"], 258)
    broken = tokenizer("🙂", add_special_tokens=False)["input_ids"][:2]
    letters = tokenizer("ab", add_special_tokens=False)["input_ids"]
    pieces = Pieces(tokenizer).of([*broken, *letters])
    assert pieces[-len(letters) :] == ["a", "b"]
    assert "\ufffd" in "".join(pieces)
    assert "\ufffd" in "".join(Pieces(tokenizer).of(broken))
    assert Pieces(tokenizer).of([]) == []
    assert len(Pieces(tokenizer).of(broken[:1] * 30)) == 30
