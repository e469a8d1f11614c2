"""What a model and its tokenizer must agree on."""

from __future__ import annotations

from collections.abc import Sequence
from weakref import WeakKeyDictionary

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kedge.errors import UserError


def special_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, tuple[int, ...]]:
    """Find the padding id and every id that ends a response.

    The end ids are the tokenizer's first, then those of the model's generation configuration (chat models end
    a turn with another token than a text). A missing padding token is no error: the first end id takes its
    place, which is safe because Kedge tells padding by lengths and never by the id.

    Returns:
        ``(pad_id, eos_ids)``, at least one end id.

    Raises:
        UserError: there is no end-of-text token, or an id lies outside the model's vocabulary.

    >>> from kedge.models import build_model, train_bpe
    >>> model = build_model(300, hidden_size=8, layers=1, heads=2, context=16, seed=0)
    >>> special_tokens(model, train_bpe(["a b c"], 258))
    (0, (1,))
    """
    rows = int(model.get_input_embeddings().weight.shape[0])
    ends: list[int] = []
    for holder in (tokenizer, getattr(model, "generation_config", None), model.config):
        value = getattr(holder, "eos_token_id", None)
        ends.extend(value if isinstance(value, (list, tuple)) else [] if value is None else [value])
    if not ends:
        raise UserError(
            f"neither the tokenizer ({type(tokenizer).__name__}) nor the model ({type(model).__name__}) "
            "has an end-of-text token, so no response could ever end: set tokenizer.eos_token (and "
            "eos_token_id in config.json) to a token that your training text ends with"
        )
    pad = tokenizer.pad_token_id
    pad = getattr(model.config, "pad_token_id", None) if pad is None else pad
    pad = ends[0] if pad is None else pad
    for name, number in [*(("eos", end) for end in ends), ("pad", pad)]:
        if not 0 <= number < rows:
            raise UserError(
                f"the {name} token has id {number}, but the model's vocabulary has {rows} rows: use the "
                "tokenizer that belongs to the model, "
                "or enlarge it with model.resize_token_embeddings(len(tokenizer))"
            )
    return int(pad), tuple(dict.fromkeys(int(end) for end in ends))


def usable_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Count the rows of the output head that stand for tokens; ``None`` if all do.

    Vocabularies are often padded to a round number; the rows beyond the tokenizer's last id mean nothing,
    must never be sampled, and have no share in a probability. Sampler and trainer both take this number.

    Raises:
        UserError: the tokenizer knows ids that the model has no row for.

    >>> from kedge.models import build_model, train_bpe
    >>> model = build_model(300, hidden_size=8, layers=1, heads=2, context=16, seed=0)
    >>> usable_vocabulary(model, train_bpe(["a b c"], 258))
    258
    """
    rows, tokens = int(model.get_output_embeddings().weight.shape[0]), _id_limit(tokenizer)
    if tokens > rows:
        raise UserError(
            f"the tokenizer's ids go up to {tokens - 1}, the model's vocabulary {rows} rows: use the "
            "tokenizer that belongs to the model, "
            "or enlarge it with model.resize_token_embeddings(len(tokenizer))"
        )
    return tokens if tokens < rows else None


def require_embeddings(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer that knows ids for which the model has no embedding.

    Raises:
        UserError: it does.

    >>> from kedge.models import build_model, train_bpe
    >>> require_embeddings(build_model(300, hidden_size=8, layers=1, heads=2), train_bpe(["a b c"], 258))
    """
    rows, tokens = int(model.get_input_embeddings().weight.shape[0]), _id_limit(tokenizer)
    if tokens > rows:
        raise UserError(
            f"the tokenizer's ids go up to {tokens - 1}, but {type(model).__name__} has {rows} embeddings: use the "
            "tokenizer that belongs to the model"
        )


def vocabulary_difference(ours: PreTrainedTokenizerBase, theirs: PreTrainedTokenizerBase) -> str | None:
    """Say how two tokenizers differ in what their ids stand for; ``None`` if they do not.

    >>> from kedge.models import train_bpe
    >>> one, other = train_bpe(["a b c"], 258), train_bpe(["a b c a b c"], 260)
    >>> vocabulary_difference(one, one), vocabulary_difference(one, other)
    (None, "260 entries, not 258; for example 'Ġb': id 258, not none")
    """
    mine, yours = ours.get_vocab(), theirs.get_vocab()
    differing = [word for word, number in yours.items() if mine.get(word) != number]
    differing += [word for word in mine if word not in yours]
    if not differing:
        return None
    sizes = f"{len(yours)} entries" + (f", not {len(mine)}" if len(yours) != len(mine) else "")
    word = min(differing)
    places = [("none" if word not in vocabulary else str(vocabulary[word])) for vocabulary in (mine, yours)]
    return f"{sizes}; for example {word!r}: id {places[1]}, not {places[0]}"


def context_length(model: PreTrainedModel) -> int | None:
    """Read how many tokens a sequence (prompt and response) can have; ``None`` if the model does not say.

    >>> from kedge.models import build_model
    >>> context_length(build_model(32, hidden_size=8, layers=1, heads=2, context=16, seed=0))
    16
    """
    value = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    return None if value is None else int(value)


def require_context(model: PreTrainedModel, sizes: Sequence[int]) -> None:
    """Refuse sequences that the model has no positions for.

    Args:
        model: any causal language model.
        sizes: tokens in each sequence.

    Raises:
        UserError: naming the longest one.

    >>> from kedge.models import build_model
    >>> require_context(build_model(32, hidden_size=8, layers=1, heads=2, context=16, seed=0), [3, 16])
    """
    context = context_length(model)
    if context is not None and max(sizes) > context:
        raise UserError(
            f"sequence {sizes.index(max(sizes))} has {max(sizes)} tokens, but the context of "
            f"{type(model).__name__} is {context}: shorten prompts or responses"
        )


_LIMITS: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[int, int]] = WeakKeyDictionary()


def _id_limit(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return one more than the highest token id; remembered, because listing a large vocabulary is slow."""
    size, limit = _LIMITS.get(tokenizer, (-1, 0))
    if size != len(tokenizer):
        limit = max(tokenizer.get_vocab().values(), default=-1) + 1
        _LIMITS[tokenizer] = (len(tokenizer), limit)
    return limit
