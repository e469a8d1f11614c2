"""Stop strings are found in the tail, whatever tokens spell them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from kedge.models import train_bpe
from kedge.rollout.stop import StopStrings

TEXT = "the end of the answer: #### né 你好"
BYTES, WORDS = train_bpe([TEXT], 258), train_bpe([TEXT] * 5, 320)


@given(
    st.text(alphabet="ab é你", max_size=30),
    st.text(alphabet="ab é你", min_size=1, max_size=12),
    st.sampled_from([BYTES, WORDS]),
)
def test_it_is_found_as_soon_as_it_is_complete(before, stop, tokenizer):
    tokens = tokenizer.encode(before + stop)
    stops = StopStrings(tokenizer, (stop, "never said"))
    completed = [bool(stops.completed(torch.tensor([tokens[: end + 1]]))) for end in range(len(tokens))]
    texts = [tokenizer.decode(tokens[: end + 1]) for end in range(len(tokens))]
    assert completed.index(True) == next(end for end, text in enumerate(texts) if stop in text)


def test_the_end_token_has_a_text_too():
    assert StopStrings(BYTES, ("<eos>",)).completed(torch.tensor([[60, 1], [60, 61]])).tolist() == [
        True,
        False,
    ]


@pytest.mark.parametrize(("stop", "found"), [(" ", True), (" b", True), ("b ", False), ("a b", True)])
def test_decoders_that_strip_the_first_space_do_not_hide_it(stop, found):
    inner = Tokenizer(models.WordLevel({"▁a": 0, "▁b": 1}, unk_token="▁a"))
    inner.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner)
    assert tokenizer.decode([0, 1]) == "a b"
    assert bool(StopStrings(tokenizer, (stop,)).completed(torch.tensor([[0, 1]]))) == found
