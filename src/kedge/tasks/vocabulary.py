"""Tokenizers over a fixed list of symbols."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD = "<pad>"
EOS = "<eos>"


def fixed_tokenizer(
    symbols: Sequence[str], unit: Literal["word", "character"], context: int
) -> PreTrainedTokenizerFast:
    """Build a tokenizer whose vocabulary is ``<pad>``, ``<eos>``, then ``symbols`` in the order given.

    Texts are split at spaces (``unit="word"``) or into characters (``unit="character"``); for texts
    made of the symbols, with single spaces between words, ``decode(encode(text)) == text``. There is
    no unknown token: other text is an error instead of silently becoming something else.

    Args:
        symbols: words or characters, each once.
        unit: what one token is.
        context: the longest sequence, in tokens, that a model of this task is built for.

    Returns:
        A fast tokenizer with pad and eos set, that adds no special tokens when encoding.

    >>> from kedge.tasks.vocabulary import fixed_tokenizer
    >>> tokenizer = fixed_tokenizer(["a", "cat", "sleeps"], unit="word", context=16)
    >>> tokenizer.encode("a cat sleeps")
    [2, 3, 4]
    >>> tokenizer.decode([2, 3, 4])
    'a cat sleeps'
    """
    from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    vocabulary = {symbol: index for index, symbol in enumerate([PAD, EOS, *symbols])}
    if len(vocabulary) != len(symbols) + 2:
        raise ValueError("symbols must be distinct, and none of them <pad> or <eos>")
    tokenizer = Tokenizer(WordLevel(vocabulary))
    if unit == "word":
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
        tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )
