"""Small models made on the spot, with random weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from kedge.errors import UserError
from kedge.models._quiet import quiet

_ARCHITECTURES = ("llama", "qwen3", "gemma2", "gpt2", "mistral")


def build_model(
    vocab_size: int,
    *,
    architecture: str = "llama",
    hidden_size: int = 128,
    layers: int = 4,
    heads: int = 4,
    intermediate_size: int | None = None,
    context: int = 256,
    seed: int = 0,
    pad_id: int | None = None,
    eos_id: int | None = None,
    bos_id: int | None = None,
    tie: bool = True,
    options: Mapping[str, object] | None = None,
) -> PreTrainedModel:
    """Build a causal language model with seeded random weights, in evaluation mode.

    Args:
        vocab_size: V, rows of the embedding.
        architecture: one of llama, qwen3, gemma2, gpt2, mistral.
        hidden_size: H; a multiple of ``heads``.
        layers: decoder layers.
        heads: attention heads (as many for keys and values).
        intermediate_size: width of the feed-forward part; 4 H if not given.
        context: the largest number of tokens in a sequence.
        seed: the weights depend on it alone; the global random state is left as it was.
        pad_id: padding token.
        eos_id: token that ends a response.
        bos_id: token that starts a text.
        tie: output head and embedding share their weights.
        options: further fields of the architecture's configuration, such as ``{"sliding_window": 8}``.

    Raises:
        UserError: an unknown architecture; sizes that do not fit together; an unknown field.

    >>> model = build_model(64, hidden_size=32, layers=2, heads=2, context=32, seed=0)
    >>> model.config.model_type, sum(parameter.numel() for parameter in model.parameters())
    ('llama', 34976)
    """
    if architecture not in _ARCHITECTURES:
        raise UserError(f"architecture = {architecture!r} is not one of {', '.join(_ARCHITECTURES)}")
    if hidden_size % heads or (hidden_size // heads) % 2:
        raise UserError(
            f"hidden_size = {hidden_size} must be an even multiple of heads = {heads} "
            f"(for example {2 * heads * max(1, round(hidden_size / (2 * heads)))})"
        )
    inner = 4 * hidden_size if intermediate_size is None else intermediate_size
    fields: dict[str, object] = {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": context,
        "pad_token_id": pad_id,
        "eos_token_id": eos_id,
        "bos_token_id": bos_id,
        "tie_word_embeddings": tie,
    }
    if architecture == "gpt2":
        fields["n_inner"] = inner
    else:
        fields.update(intermediate_size=inner, num_key_value_heads=heads, head_dim=hidden_size // heads)
    fields.update(options or {})
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # a GPU's is left as it was
        config = AutoConfig.for_model(architecture, **fields)
        _refuse_unknown(config, architecture, options or {})
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def _refuse_unknown(config: object, architecture: str, options: Mapping[str, object]) -> None:
    """Refuse a field that the architecture does not have: it would be kept and do nothing."""
    known = type(config)()
    for name in options:
        if not hasattr(known, name):
            raise UserError(f"options.{name}: the configuration of {architecture} has no such field")
