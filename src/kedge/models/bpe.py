"""A byte-level BPE tokenizer trained on the spot."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from kedge.errors import UserError

_ALPHABET = 256
_SPECIAL = ("<pad>", "<eos>")


def train_bpe(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer: every text can be encoded and comes back unchanged.

    Digits are tokens of their own, so that a number is spelt the same way wherever it stands. Equal texts
    give an equal tokenizer.

    Args:
        texts: what the merges are learned from.
        vocab_size: number of tokens at most, ``<pad>`` (id 0), ``<eos>`` (id 1) and the 256 bytes among them.

    Raises:
        UserError: ``vocab_size`` leaves no room for the bytes.

    Source: Sennrich, Haddow & Birch 2016 (arXiv 1508.07909); the byte alphabet of Radford et al. 2019
    (GPT-2).

    >>> tokenizer = train_bpe(["low lower lowest"] * 4, vocab_size=270)
    >>> tokenizer.decode(tokenizer.encode("lower: 12 \u2264 13"))
    'lower: 12 \u2264 13'
    >>> tokenizer.pad_token_id, tokenizer.eos_token_id
    (0, 1)
    """
    if vocab_size < _ALPHABET + len(_SPECIAL):
        raise UserError(
            f"vocab_size = {vocab_size} is too small for byte-level BPE: at least "
            f"{_ALPHABET + len(_SPECIAL)} (256 bytes and two special tokens)"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(_SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=_SPECIAL[0],
        eos_token=_SPECIAL[1],
        clean_up_tokenization_spaces=False,
    )
