"""The output head of a model, told apart from its backbone."""

from __future__ import annotations

import torch
from transformers import PretrainedConfig, PreTrainedModel

from kedge.errors import UserError
from kedge.head import Anchor, Head
from kedge.head.dense import head_logits
from kedge.models.hidden import hidden_states
from kedge.models.mode import evaluating

_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def head_of(model: PreTrainedModel, vocabulary: int | None = None) -> Head:
    """Take the output head of a causal language model: what turns a hidden state into logits.

    logits = softcap · tanh(scale · (h Wᵀ + b) / softcap); scale and soft-cap come from the configuration:
    ``final_logit_softcapping`` (Gemma), ``logit_scale`` (Cohere), ``logits_scaling`` (Granite divides by it,
    HyperCLOVA X multiplies), ``lm_head_multiplier`` (Falcon-H1). What is not known here,
    :func:`verify_head` finds out.

    Args:
        model: its weight and bias are taken as they are, not copied, so gradients reach them; a tied weight
            is the embedding itself.
        vocabulary: number of rows that stand for tokens (``usable_vocabulary``), all if not given.

    Raises:
        UserError: the model has no output embeddings, or quantised ones; more tokens than rows.

    >>> from kedge.models import build_model
    >>> model = build_model(32, architecture="gemma2", hidden_size=8, layers=1, heads=2, context=16, seed=0)
    >>> head_of(model).softcap, head_of(model).weight is model.get_input_embeddings().weight
    (30.0, True)
    """
    layer = model.get_output_embeddings()
    if layer is None:
        raise UserError(
            f"{type(model).__name__} has no output head over a vocabulary: give a causal language model"
        )
    weight = layer.weight
    if vocabulary is not None and not 0 < vocabulary <= weight.shape[0]:
        raise UserError(
            f"vocabulary = {vocabulary}, but the head of {type(model).__name__} has {weight.shape[0]} rows"
        )
    if not weight.is_floating_point():
        raise UserError(
            f"the output head of {type(model).__name__} is quantised ({weight.dtype}): leave it out of the "
            "quantisation (formats call it lm_head, in modules_to_not_convert or the like)"
        )
    config = model.config.get_text_config(decoder=True)
    return Head(
        weight=weight,
        bias=getattr(layer, "bias", None),
        scale=_scale(config),
        softcap=getattr(config, "final_logit_softcapping", None),
        vocabulary=vocabulary,
    )


def _scale(config: PretrainedConfig) -> float:
    """Read the factor between product and logits."""
    scale = 1.0
    for name in ("logit_scale", "lm_head_multiplier"):
        value = getattr(config, name, None)
        scale *= 1.0 if value is None else float(value)
    divisor = getattr(config, "logits_scaling", None)
    if divisor is not None:
        scale *= float(divisor) if config.model_type.startswith("hyperclovax") else 1.0 / float(divisor)
    return scale


@torch.no_grad()
def verify_head(model: PreTrainedModel) -> None:
    """Check on a few tokens that :func:`head_of` gives the model's own logits.

    Raises:
        UserError: it does not, naming the architecture and the difference: every score would be wrong. Logits that
            are not finite, naming the model and the first weight that is the cause.

    >>> from kedge.models import build_model
    >>> verify_head(build_model(32, architecture="gpt2", hidden_size=8, layers=1, heads=2, context=16, seed=0))
    """
    rows = int(model.get_input_embeddings().weight.shape[0])
    ids = torch.arange(1, 13, device=model.get_input_embeddings().weight.device) * 7 % rows
    lengths = torch.tensor([len(ids)], device=ids.device)
    head = head_of(model)
    forward = getattr(
        model, "_original_forward", model
    )  # beneath the autocast that Accelerate puts around it
    with evaluating(model):
        theirs = forward(input_ids=ids[None], use_cache=False).logits[0]
        hidden = hidden_states(model, ids, lengths)
    if not theirs.isfinite().all():
        raise UserError(_not_finite(model))
    ours = head_logits(Anchor(hidden, head), temperature=1.0, dtype=torch.float64)
    difference = float(
        (ours.double() - theirs.double()).abs().max() / theirs.double().abs().max().clamp(min=1e-30)
    )
    if not difference <= _TOLERANCE.get(theirs.dtype, 5e-2):
        raise UserError(
            f"the output head of {type(model).__name__} ({model.config.model_type}) is not the known form "
            f"softcap · tanh(scale · (h Wᵀ + b) / softcap): logits differ by {difference:.2g} of their "
            "largest; Kedge cannot train this architecture yet, so please report it"
        )


def _not_finite(model: PreTrainedModel) -> str:
    path = str(model.config.name_or_path)
    name = type(model).__name__ + (f" {path!r}" if path else "")
    for parameter, value in model.named_parameters():
        if not value.isfinite().all():
            return (
                f"{name}: {parameter} holds NaN or infinity, so nothing that it predicts is a number: its training "
                "diverged or its files are damaged; take an earlier checkpoint"
            )
    return f"{name}: its weights are finite, its logits in {model.dtype} are not: use a wider dtype"
