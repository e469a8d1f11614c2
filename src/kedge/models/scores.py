"""One score for each sequence: a causal model with a head of one label, read at the last token."""

from __future__ import annotations

import copy
import math
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from kedge.errors import UserError
from kedge.models._quiet import quiet
from kedge.models.hidden import hidden_states
from kedge.models.mode import evaluating

_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def reward_model_from(
    policy: PreTrainedModel, *, seed: int, pad_id: int | None, end_ids: tuple[int, ...] = ()
) -> PreTrainedModel:
    """Build a reward model from a language model: a copy of its backbone under a fresh head of one label.

    The head's weights are drawn from N(0, 1/(H + 1)), H being the width, as published; nothing is shared with
    the policy.

    Args:
        policy: any causal language model whose architecture transformers also has as a sequence classifier.
        seed: the head depends on it alone; the global random state is left as it was.
        pad_id: the tokenizer's padding token. transformers' own forward pass takes the last token that is not
            padding, so an id that ends responses would hide the token that is scored; then the model names none,
            and transformers scores one sequence at a time, right.
        end_ids: tokens that end a response.

    Raises:
        UserError: the architecture has no sequence classifier.

    Source: Stiennon et al. 2020, arXiv 2009.01325.

    >>> from kedge.models import build_model
    >>> policy = build_model(32, hidden_size=8, layers=1, heads=2, context=16, seed=0)
    >>> model = reward_model_from(policy, seed=0, pad_id=0, end_ids=(1,))
    >>> sequence_scores(model, torch.tensor([3, 4, 5, 6, 7]), torch.tensor([2, 3])).shape
    torch.Size([2])
    """
    config = copy.deepcopy(policy.config)
    config.num_labels = 1
    text = config.get_text_config(decoder=True)
    text.pad_token_id = None if pad_id in end_ids else pad_id
    if len(end_ids) > 1:  # a language model's generation configuration has them, a classifier has none
        text.eos_token_id = list(end_ids)
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # a GPU's is left as it was
        try:
            model = AutoModelForSequenceClassification.from_config(config, dtype=policy.dtype)
        except ValueError as error:
            raise UserError(
                f"{type(policy).__name__} ({config.model_type}) has no sequence classifier in transformers, so no "
                "reward model can be built from it: give another architecture, or path: a classifier"
            ) from error
        head = _head(model)
        torch.nn.init.normal_(head.weight, std=1.0 / math.sqrt(head.in_features + 1))
    model.get_decoder().load_state_dict(policy.get_decoder().state_dict())
    placed: PreTrainedModel = model.to(policy.device)
    return placed.eval()


def sequence_scores(
    model: PreTrainedModel,
    tokens: Int[Tensor, " S"],
    lengths: Int[Tensor, " R"],
    *,
    layout: Literal["padded", "packed"] = "padded",
) -> Float[Tensor, " R"]:
    """Score each sequence by the hidden state of its last token: r = w·h_last.

    Which token is the last is told by the lengths, never by the padding id, so padding, the order in the batch
    and its size do not matter.

    Args:
        model: a sequence classifier with one label on a causal backbone, on the device of the tokens.
        tokens: S ids, the sequences one after another.
        lengths: tokens in each of the R sequences.
        layout: as in :func:`kedge.models.hidden_states`.

    Returns:
        Scores, differentiable, in float32 at least.

    Raises:
        ValueError: lengths that do not fit the tokens.
        UserError: a sequence longer than the model's context.
    """
    hidden = hidden_states(model, tokens, lengths, layout=layout)
    return _score(model, hidden[lengths.cumsum(0) - 1])


def _score(model: PreTrainedModel, hidden: Float[Tensor, "R H"]) -> Float[Tensor, " R"]:
    """Apply the head outside autocast: a score in bfloat16 would have three digits."""
    head = _head(model)
    with torch.autocast(hidden.device.type, enabled=False):
        dtype = torch.promote_types(head.weight.dtype, torch.float32)
        bias = head.bias.to(dtype) if head.bias is not None else None
        scores: Tensor = torch.nn.functional.linear(hidden.to(dtype), head.weight.to(dtype), bias)
    return scores[:, 0]


def _head(model: PreTrainedModel) -> torch.nn.Linear:
    head = getattr(model, "score", None)
    if not isinstance(head, torch.nn.Linear) or head.out_features != 1:
        raise UserError(
            f"{type(model).__name__} has no head of one label over its last hidden state (`score`): give a sequence "
            "classifier with one label on a causal backbone"
        )
    return head


@torch.no_grad()
def verify_scores(model: PreTrainedModel) -> None:
    """Check on a few tokens that :func:`sequence_scores` gives the model's own scores, and that it never looks ahead.

    Raises:
        UserError: it does not (an encoder, another head), naming the architecture: every score would be wrong.

    >>> from kedge.models import build_model
    >>> policy = build_model(32, hidden_size=8, layers=1, heads=2, context=16, seed=0)
    >>> verify_scores(reward_model_from(policy, seed=0, pad_id=0))
    """
    embeddings = model.get_input_embeddings().weight
    ids = torch.arange(1, 9, device=embeddings.device) * 7 % int(embeddings.shape[0])
    pad = model.config.get_text_config(decoder=True).pad_token_id
    if pad is not None:
        ids[ids == pad] = (pad + 1) % int(embeddings.shape[0])
    whole = torch.tensor([len(ids)], device=ids.device)
    with evaluating(model):
        theirs = model(input_ids=ids[None]).logits.reshape(-1)
        ours = sequence_scores(model, ids, whole)
        alone = sequence_scores(model, ids[:4], whole * 0 + 4)
        hidden = hidden_states(model, ids, whole)
    scale = _TOLERANCE.get(model.dtype, 5e-2) * max(1.0, float(theirs.abs().max()))
    ahead = (_score(model, hidden[3:4]) - alone).abs().max()
    if theirs.numel() != 1 or float((ours - theirs).abs().max()) > scale or float(ahead) > scale:
        raise UserError(
            f"{type(model).__name__} ({model.config.model_type}) does not score a sequence by the hidden state of its "
            "last token alone, as a causal model with a head of one label does; Kedge cannot use it as a reward model"
        )
