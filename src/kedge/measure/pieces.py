"""The text of each token, such that the texts of a response put together are the response's."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

UNFINISHED = "\ufffd"
"""What decoders write for bytes that are no whole character yet."""
_MOST_OPEN = 8


class Pieces:
    """Splits decoded responses at their tokens.

    A character that is split over several tokens (an emoji in a byte-level vocabulary) goes to the last of them,
    the others are empty.

    Args:
        tokenizer: of both models.

    >>> from kedge.models import train_bpe
    >>> tokenizer = train_bpe(["a b c"], 258)
    >>> ids = tokenizer("a 🙂", add_special_tokens=False)["input_ids"]
    >>> Pieces(tokenizer).of(ids)
    ['a', ' ', '', '', '', '🙂']
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._alone: dict[int, str] = {}

    def alone(self, token: int) -> str:
        """Text of a token by itself; special tokens by their names."""
        if token not in self._alone:
            self._alone[token] = self._decode([token])
        return self._alone[token]

    def whole(self, tokens: Sequence[int]) -> str:
        """Text of tokens in a row."""
        return self.alone(tokens[0]) if len(tokens) == 1 else self._decode(tokens)

    def of(self, tokens: Sequence[int]) -> list[str]:
        """Texts of the tokens of one response.

        Each is what the token adds to the text of those before it, of which a few are enough: decoders look no
        further than the token before for spaces, and than a character's first byte.
        """
        pieces: list[str] = []
        start, done = 0, 0  # context from start on; tokens before done have their text
        for end in range(1, len(tokens) + 1):
            before = self.whole(tokens[start:done])
            text = self._decode(tokens[start:end])
            if text.endswith(UNFINISHED) and end - done < _MOST_OPEN and end < len(tokens):
                pieces.append("")
                continue
            added = text[len(before) :]
            if end - done > 1:  # bytes that never became a character belong to the tokens before
                pieces[-1] = added[: len(added) - len(added.lstrip(UNFINISHED))]
                added = added.lstrip(UNFINISHED)
            pieces.append(added)
            start, done = done, end
        return pieces

    def _decode(self, tokens: Sequence[int]) -> str:
        if not tokens:
            return ""
        text = self._tokenizer.decode(
            list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return str(text)
