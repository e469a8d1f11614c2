"""Which weights a model holds, told by a hash."""

from __future__ import annotations

import copy
import hashlib

import torch
from transformers import PreTrainedModel


def frozen_copy(model: PreTrainedModel) -> PreTrainedModel:
    """Copy a model into one that nothing trains: its own weights, no gradients, evaluation mode.

    Tied weights stay tied in the copy. This is the reference by default.

    >>> from kedge.models import build_model
    >>> model = build_model(32, hidden_size=8, layers=1, heads=2, context=16, seed=0)
    >>> reference = frozen_copy(model)
    >>> any(parameter.requires_grad for parameter in reference.parameters())
    False
    >>> fingerprint(reference) == fingerprint(model)
    True
    """
    return copy.deepcopy(model).requires_grad_(False).eval()


def fingerprint(model: PreTrainedModel) -> str:
    """Hash a model's weights into an identity: SHA-256 over names, dtypes, shapes and bytes.

    A tensor that has several names (tied weights) counts once, under the first; buffers count if they are
    saved. So the hash survives saving and loading, moving to another device, and freezing; it changes with
    one bit of one weight and with the dtype.

    Returns:
        64 hexadecimal digits.

    >>> from kedge.models import build_model
    >>> one, same, other = (build_model(32, hidden_size=8, layers=1, heads=2, seed=seed) for seed in (0, 0, 1))
    >>> fingerprint(one) == fingerprint(same), fingerprint(one) == fingerprint(other)
    (True, False)
    """
    tensors = dict(model.named_parameters())
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    tensors.update((name, value) for name, value in model.state_dict().items() if name not in parameters)
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach()
        digest.update(f"{name}\0{value.dtype}\0{tuple(value.shape)}\0".encode())
        digest.update(value.contiguous().view(-1).view(torch.uint8).cpu().numpy().data)
    return digest.hexdigest()
