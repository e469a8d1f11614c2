"""What a model remembers of a sequence."""

from __future__ import annotations

from transformers import PreTrainedModel

_ATTENTION = frozenset({"full_attention", "sliding_attention", "chunked_attention"})


def beside_attention(model: PreTrainedModel) -> str | None:
    """Name what a model remembers besides keys and values, such as the state of a recurrence; None: nothing.

    >>> from kedge.models import build_model
    >>> beside_attention(build_model(32, hidden_size=8, layers=1, heads=2, context=16, seed=0))
    """
    kinds = getattr(model.config.get_text_config(decoder=True), "layer_types", None) or ()
    others = sorted(set(kinds) - _ATTENTION)
    if others:
        return ", ".join(others)
    return "a recurrent state" if getattr(model, "_is_stateful", False) else None
