"""Stop strings, looked for in the text of the last tokens."""

from __future__ import annotations

from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

_MARGIN = 4
"""Tokens decoded beyond the longest stop string's bytes: some decoders treat a text's first tokens apart."""


class StopStrings:
    """Tell which responses have just completed a stop string.

    Every token stands for at least one byte, so a string of n bytes that ends now lies within the last n
    tokens; that tail alone is decoded, for the check alone.

    Args:
        tokenizer: decodes the tail, special tokens included.
        stop: the strings.

    >>> import torch
    >>> from kedge.models import train_bpe
    >>> tokenizer = train_bpe(["a b c"], 258)
    >>> tokens = torch.tensor([tokenizer.encode("an END"), tokenizer.encode("an and")])
    >>> StopStrings(tokenizer, ("END",)).completed(tokens)
    tensor([ True, False])
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: tuple[str, ...]) -> None:
        self._tokenizer = tokenizer
        self._stop = stop
        self._tail = max(len(string.encode()) for string in stop) + _MARGIN

    def completed(self, responses: Int[Tensor, "R T"]) -> Bool[Tensor, " R"]:
        """Whether a stop string lies in the last tokens of each response so far."""
        texts = self._tokenizer.batch_decode(
            responses[:, -self._tail :].tolist(),
            skip_special_tokens=False,
            clean_up_tokenization_spaces=False,
        )
        found = [any(string in text for string in self._stop) for text in texts]
        return responses.new_tensor(found).bool()
