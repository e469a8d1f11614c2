"""The keys and values of a batch of growing sequences, written in place."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from kedge.errors import UserError
from kedge.models import beside_attention, to_the_end


class RolloutCache(Cache):
    """A cache for one prefill of the prompts and many steps of one token for each response.

    Nothing is concatenated: after the prefill, ``expand`` allocates room for whole sequences, each step
    writes one column, ``keep`` moves the rows that go on to the front. Layers with a sliding window keep
    all their keys too: masks alone decide what is seen, so that one rule serves every attention.

    Args:
        capacity: tokens in the longest sequence, padding included.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__(layer_class_to_replicate=lambda: _RolloutLayer(capacity))

    def expand(self, copies: int, lengths: Tensor) -> None:
        """Turn the row of each prompt into ``copies`` rows that end together, where the responses go on.

        Prompts come in padded on the right; the mask hides what is left before each.
        """
        group = torch.arange(len(lengths), device=lengths.device).repeat_interleave(copies)
        for layer in self.layers:
            layer.expand(group, lengths)

    def keep(self, rows: Tensor) -> None:
        """Drop every other row."""
        for layer in self.layers:
            layer.keep(rows)


class _RolloutLayer(DynamicLayer):
    """One layer of the cache; ``keys`` and ``values`` are views of the part that is filled."""

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self.length = 0

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        key_states, value_states = _as_attention_reads(key_states), _as_attention_reads(value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.key_room, self.value_room = key_states, value_states
            self.length = key_states.shape[-2]
        else:
            end = self.length + key_states.shape[-2]
            self.key_room[:, :, self.length : end] = key_states
            self.value_room[:, :, self.length : end] = value_states
            self.length = end
        self._view()
        return self.keys, self.values

    def expand(self, group: Tensor, lengths: Tensor) -> None:
        self.key_room = self._roomy(to_the_end(self.keys, group, lengths))
        self.value_room = self._roomy(to_the_end(self.values, group, lengths))
        self._view()

    def keep(self, rows: Tensor) -> None:
        for room in (self.key_room, self.value_room):
            room[: len(rows), :, : self.length] = room[rows, :, : self.length]
        self.key_room, self.value_room = self.key_room[: len(rows)], self.value_room[: len(rows)]
        self._view()

    def _roomy(self, filled: Tensor) -> Tensor:
        rows, heads, length, width = filled.shape
        room = filled.new_empty(rows, heads, self.capacity, width)
        room[:, :, :length] = filled
        return room

    def _view(self) -> None:
        self.keys = self.key_room[:, :, : self.length]
        self.values = self.value_room[:, :, : self.length]


def _as_attention_reads(states: Tensor) -> Tensor:
    """Round, under autocast, what attention would round again at every token: rotated keys are float32 there."""
    kind = states.device.type
    if states.dtype == torch.float32 and torch.is_autocast_enabled(kind):
        return states.to(torch.get_autocast_dtype(kind))
    return states


def require_cacheable(model: PreTrainedModel) -> None:
    """Refuse a model whose memory of a sequence is not a list of keys and values.

    Raises:
        UserError: naming the architecture.
    """
    other = beside_attention(model)
    if other is not None:
        raise UserError(
            f"{type(model).__name__} keeps {other} beside attention: "
            "in-process rollouts work with attention alone; choose another architecture"
        )
