"""The last hidden states of every token of a batch of sequences."""

from __future__ import annotations

from typing import Literal
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from kedge.errors import UserError
from kedge.models.linear import fast_linears
from kedge.models.mode import evaluating, recomputing
from kedge.models.tokens import require_context


def hidden_states(
    model: PreTrainedModel,
    tokens: Int[Tensor, " S"],
    lengths: Int[Tensor, " R"],
    *,
    layout: Literal["padded", "packed"] = "padded",
    padding_side: Literal["right", "left"] = "right",
) -> Float[Tensor, "S H"]:
    """Compute what the output head reads: the hidden state of each token after the final norm.

    Only the backbone runs, never the model's own output head. The layout is a matter of speed and memory
    alone:

    * ``padded``: a row for each sequence, padded to the longest. Padding on the right needs no mask,
      because a causal model never looks ahead; padding on the left is masked. Position ids count the real
      tokens.
    * ``packed``: one row for all, position ids starting anew, attention within each sequence; no work is
      spent on padding, but attention holds an S × S mask unless the kernel takes sequence boundaries.
      Before it is first used, a model must prove that its sequences do not see each other.

    Args:
        model: any causal language model of transformers, on the device of the tokens.
        tokens: S ids, the sequences one after another.
        lengths: tokens in each of the R sequences; they add up to S.
        layout: how the batch is laid out for the model.
        padding_side: where padding goes in the padded layout.

    Returns:
        Hidden states in the order of ``tokens``, differentiable, in the model's dtype.

    Raises:
        ValueError: lengths that do not fit the tokens.
        UserError: a sequence longer than the model's context; packing that the model does not support.

    >>> from kedge.models import build_model
    >>> model = build_model(32, hidden_size=8, layers=1, heads=2, context=16, seed=0)
    >>> tokens, lengths = torch.tensor([3, 4, 5, 6, 7]), torch.tensor([2, 3])
    >>> padded = hidden_states(model, tokens, lengths)
    >>> packed = hidden_states(model, tokens, lengths, layout="packed")
    >>> padded.shape, torch.allclose(padded, packed, atol=1e-5)
    (torch.Size([5, 8]), True)
    """
    sizes = lengths.tolist()
    if not sizes or min(sizes) < 1 or sum(sizes) != tokens.shape[0]:
        raise ValueError(
            f"lengths {sizes} must be positive and add up to the number of tokens ({tokens.shape[0]})"
        )
    require_context(model, sizes)
    starts = lengths.cumsum(0) - lengths
    row = torch.repeat_interleave(lengths, output_size=tokens.shape[0])
    position = torch.arange(tokens.shape[0], device=tokens.device) - starts[row]
    if layout == "packed":
        _require_packing(model)
        return _run(model, tokens[None], position[None], None)[0]
    width = max(sizes)
    columns = torch.arange(width, device=tokens.device)[None]
    mask = None
    if padding_side == "left":
        _refuse_left_padding(model)
        columns = columns - (width - lengths)[:, None]
        mask = (columns >= 0).long()
        position = position + (width - lengths)[row]
    ids = tokens.new_zeros(len(sizes), width)
    ids[row, position] = tokens
    return _run(model, ids, columns.clamp(min=0), mask)[row, position]


def _run(model: PreTrainedModel, ids: Tensor, positions: Tensor, mask: Tensor | None) -> Tensor:
    """Run the backbone alone. A cache would switch packing off silently, so there is none."""
    with recomputing(model), fast_linears(model, ids.numel()):
        output = model.get_decoder()(
            input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False
        )
    hidden: Tensor = output.last_hidden_state
    return hidden


def _refuse_left_padding(model: PreTrainedModel) -> None:
    """Refuse the one case in which padding on the left makes NaN, in transformers' own attention.

    There the mask of a padding row is float64's lowest number all along, which float32 does not hold.
    """
    if model.dtype == torch.float64 and model.config._attn_implementation == "eager":
        raise UserError(
            f"{type(model).__name__} with eager attention in float64 cannot be padded on the left: pad on the right"
        )


_PACKS: WeakKeyDictionary[PreTrainedModel, str] = WeakKeyDictionary()


def _require_packing(model: PreTrainedModel) -> None:
    """Refuse a model whose packed sequences see each other.

    Two packed rows differ in their first sequence alone: the hidden states of the second one must be the
    same.
    """
    attention = str(model.config._attn_implementation)
    if _PACKS.get(model) == attention:
        return
    device = model.get_input_embeddings().weight.device
    rows = int(model.get_input_embeddings().weight.shape[0])
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3]], device=device)
    one = torch.arange(1, 8, device=device)[None] % rows
    other = torch.cat([one[:, :3].flip(1) * 5 % rows, one[:, 3:]], dim=1)
    with torch.no_grad(), evaluating(model):
        first, second = (_run(model, ids, positions, None)[0, 3:].double() for ids in (one, other))
    limit = 1e-2 if first.dtype in (torch.bfloat16, torch.float16) else 1e-5
    if (first - second).abs().max() > limit * first.abs().max():
        raise UserError(
            f"{type(model).__name__} with {attention} attention lets packed sequences see each other: "
            "use the padded layout"
        )
    _PACKS[model] = attention
