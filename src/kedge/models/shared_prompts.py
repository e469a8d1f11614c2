"""Hidden states of responses whose prompts are read once, not once for each response."""

from __future__ import annotations

import warnings
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from kedge.models.align import to_the_end
from kedge.models.hidden import hidden_states
from kedge.models.linear import fast_linears
from kedge.models.memory import beside_attention
from kedge.models.mode import evaluating
from kedge.models.tokens import require_context


def response_states(
    model: PreTrainedModel,
    prompt_tokens: Int[Tensor, " P"],
    prompt_lengths: Int[Tensor, " B"],
    response_tokens: Int[Tensor, " N"],
    response_lengths: Int[Tensor, " R"],
    group: Int[Tensor, " R"],
) -> Float[Tensor, "N H"]:
    """Compute the hidden state that predicts each response token, differentiable through the prompts' keys and values.

    The prompts are one pass, whose keys and values every response to a prompt goes on from; the responses without
    their last tokens, which predict nothing, are another. Both are padded.

    Args:
        model: any causal language model of transformers that :func:`shares_prompts`, on the device of the tokens.
        prompt_tokens: ids of the B prompts, one after another.
        prompt_lengths: tokens in each prompt.
        response_tokens: ids of the R responses, one after another.
        response_lengths: tokens in each response.
        group: the prompt that a response answers.

    Returns:
        Hidden states in the order of ``response_tokens``, in the model's dtype.

    Raises:
        UserError: a response that goes beyond the model's context.

    >>> from kedge.models import build_model
    >>> model = build_model(32, hidden_size=8, layers=1, heads=2, context=16, seed=0)
    >>> prompts, answers = (torch.tensor([3, 4]), torch.tensor([2])), (torch.tensor([5, 6, 7]), torch.tensor([1, 2]))
    >>> shared = response_states(model, *prompts, *answers, torch.tensor([0, 0]))
    >>> whole = hidden_states(model, torch.tensor([3, 4, 5, 3, 4, 6, 7]), torch.tensor([3, 4]))
    >>> torch.allclose(shared, whole[[1, 4, 5]], atol=1e-5)
    True
    """
    require_context(model, (prompt_lengths[group] + response_lengths).tolist())
    cache = DynamicCache()
    width, steps = int(prompt_lengths.max()), int(response_lengths.max()) - 1
    column = torch.arange(max(width, steps + 1), device=prompt_tokens.device)
    backbone = model.get_decoder()
    with fast_linears(model, max(width * len(prompt_lengths), steps * len(group))):
        read = backbone(
            input_ids=_padded(prompt_tokens, prompt_lengths),
            position_ids=column[None, :width],
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        states = read[torch.arange(len(prompt_lengths), device=column.device), prompt_lengths - 1][
            group, None
        ]
        if steps > 0:
            before = prompt_lengths[group][:, None]
            for layer in cache.layers:
                layer.keys = to_the_end(layer.keys, group, prompt_lengths)
                layer.values = to_the_end(layer.values, group, prompt_lengths)
            seen = torch.arange(width + steps, device=column.device) >= width - before
            later = backbone(
                input_ids=_padded(response_tokens, response_lengths)[:, :steps],
                attention_mask=None if bool(seen.all()) else seen.long(),
                position_ids=before + torch.minimum(column[:steps], response_lengths[:, None] - 1),
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state
            states = torch.cat([states, later], dim=1)
    found: Tensor = states[column[: steps + 1] < response_lengths[:, None]]
    return found


_SHARES: WeakKeyDictionary[PreTrainedModel, tuple[str, bool]] = WeakKeyDictionary()


def shares_prompts(model: PreTrainedModel) -> bool:
    """Whether :func:`response_states` is for this model.

    It must remember keys and values alone, keep its activations where gradients are recorded, and turn its queries and
    keys by their positions whatever the length. Before the first time, it must prove that a prompt read once gives the
    hidden states of one read for each response.

    >>> from kedge.models import build_model
    >>> shares_prompts(build_model(32, hidden_size=8, layers=1, heads=2, context=16, seed=0))
    True
    """
    recomputes = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    if recomputes and torch.is_grad_enabled():
        return False  # what is computed again knows no cache
    kind = f"{model.config._attn_implementation} {model.dtype}"
    if _SHARES.get(model, ("", False))[0] != kind:
        fit = beside_attention(model) is None and not _turns_by_length(model)
        _SHARES[model] = kind, fit and _proves_it(model)
    return _SHARES[model][1]


def _turns_by_length(model: PreTrainedModel) -> bool:
    """Whether rotary embeddings change once a sequence is long: a prompt's keys would be those of a short one."""
    given = getattr(model.config.get_text_config(decoder=True), "rope_parameters", None) or {}
    kinds = [given, *(each for each in given.values() if isinstance(each, dict))]
    return any(each.get("rope_type") in ("dynamic", "longrope") for each in kinds)


def _proves_it(model: PreTrainedModel) -> bool:
    """Whether a model goes on from a prompt as it should; where it breaks down over that, the user is told."""
    try:
        return _agrees(model)
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        warnings.warn(
            f"{type(model).__name__} does not go on from the keys and values of a prompt ({type(error).__name__}: "
            f"{error}): scoring and updates read each response with its prompt, which takes longer",
            stacklevel=2,
        )
        return False


@torch.no_grad()
def _agrees(model: PreTrainedModel) -> bool:
    """Try two prompts of different lengths, one with two responses, in the model's own arithmetic."""
    embeddings = model.get_input_embeddings().weight
    device, rows = embeddings.device, int(embeddings.shape[0])

    def packed(sequences: list[list[int]]) -> tuple[Tensor, Tensor]:
        tokens = torch.tensor([token % rows for each in sequences for token in each], device=device)
        return tokens, torch.tensor([len(each) for each in sequences], device=device)

    prompts, responses, group = [[1, 2], [3]], [[4, 5], [6], [7, 8, 9]], [0, 0, 1]
    answered = [prompts[prompt] + response for prompt, response in zip(group, responses, strict=True)]
    with evaluating(model), torch.autocast(device.type, enabled=False):
        whole = hidden_states(model, *packed(answered))[[1, 2, 5, 7, 8, 9]].double()
        shared = response_states(
            model, *packed(prompts), *packed(responses), torch.tensor(group, device=device)
        )
    limit = 3e-2 if model.dtype in (torch.bfloat16, torch.float16) else 1e-4
    return bool((shared.double() - whole).abs().max() <= limit * whole.abs().max())


def _padded(tokens: Tensor, lengths: Tensor) -> Tensor:
    """Return one row for each sequence, [R, T], with zeros on the right."""
    used = torch.arange(int(lengths.max()), device=tokens.device) < lengths[:, None]
    rows = tokens.new_zeros(used.shape)
    rows[used] = tokens
    return rows
