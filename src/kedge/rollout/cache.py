"""The keys and values of a batch of growing sequences, written in place."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from kedge.errors import UserError
from kedge.models import beside_attention


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
        """Turn the row of each prompt into ``copies`` rows that end together.

        Prompts come in padded on the right; each is moved to the end of its row, where the response goes on.
        What is left before it are copies of its first column, for the mask to hide.
        """
        width = self.get_seq_length()
        rows = torch.arange(len(lengths), device=lengths.device).repeat_interleave(copies)
        columns = torch.arange(width, device=lengths.device) - (width - lengths)[:, None]
        for layer in self.layers:
            layer.expand(rows, columns.clamp(min=0).repeat_interleave(copies, dim=0))

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

    def expand(self, rows: Tensor, columns: Tensor) -> None:
        self.key_room = self._roomy(self.keys, rows, columns)
        self.value_room = self._roomy(self.values, rows, columns)
        self._view()

    def keep(self, rows: Tensor) -> None:
        for room in (self.key_room, self.value_room):
            room[: len(rows), :, : self.length] = room[rows, :, : self.length]
        self.key_room, self.value_room = self.key_room[: len(rows)], self.value_room[: len(rows)]
        self._view()

    def _roomy(self, filled: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        room = filled.new_empty(len(rows), filled.shape[1], self.capacity, filled.shape[-1])
        room[:, :, : self.length] = filled.transpose(1, 2)[rows[:, None], columns].transpose(1, 2)
        return room

    def _view(self) -> None:
        self.keys = self.key_room[:, :, : self.length]
        self.values = self.value_room[:, :, : self.length]


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
