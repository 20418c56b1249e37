"""The cache of keys and values that decoding reads: its room is made once, for many tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

PREFILL_TOKENS = 4096  # of prompts, read in one pass
SPARE = 64  # tokens of room beyond what is needed


class _RoomyLayer(DynamicLayer):
    """One layer's keys and values, written into room that is made for many tokens at once: (rows, heads, room, dimension).

    `keys` and `values` are what is filled of it.
    """

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_, **__) -> tuple[torch.Tensor, ...]:
        """Each (rows, key-value heads, new tokens, head dimension) → the same of all tokens so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._room = [x[:, :, :0] for x in (key_states, value_states)]
            self._show(0)
        first = self.keys.shape[2]
        stop = first + key_states.shape[2]
        if stop > self._room[0].shape[2]:
            self._move(slice(None), stop + SPARE)
        for room, new in zip(self._room, (key_states, value_states), strict=True):
            room[:, :, first:stop] = new
        self._show(stop)
        return self.keys, self.values

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._move(indices, self._room[0].shape[2])

    def _move(self, rows: torch.Tensor | slice, length: int) -> None:
        self._room = [_room([x[rows]], length) for x in (self.keys, self.values)]
        self._show(self.keys.shape[2])

    def _show(self, filled: int) -> None:
        self.keys, self.values = (room[:, :, :filled] for room in self._room)

    def add_rows(self, others: Sequence[_RoomyLayer]) -> None:
        """Take in the rows of other layers that hold as many tokens."""
        layers, filled = [self, *others], self.keys.shape[2]
        self._room = [_room([getattr(x, name) for x in layers], filled + SPARE) for name in ("keys", "values")]
        self._show(filled)


def _room(parts: Sequence[torch.Tensor], length: int) -> torch.Tensor:
    """Rows of several tensors, one after the other, with room for `length` tokens each."""
    _, heads, filled, dim = parts[0].shape
    room = parts[0].new_empty(sum(map(len, parts)), heads, length, dim)
    torch.cat(list(parts), out=room[:, :, :filled])
    return room


def make_cache(config: object) -> Cache:
    """An empty cache; layers with a sliding window keep the one `transformers` gives them."""
    cache = DynamicCache(config=config)
    cache.layers = [_RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def joined(caches: Sequence[Cache]) -> Cache:
    """One cache with the rows of several that `make_cache` made and that hold as many tokens each."""
    first, *others = caches
    if others:
        for index, layer in enumerate(first.layers):
            layer.add_rows([other.layers[index] for other in others])
    return first


def rows_at_once(config: object, length: int) -> int:
    """How many prompts of some length to read in one pass: few, since large tensors are slow to come by; all, if need be."""
    roomy = all(isinstance(layer, _RoomyLayer) for layer in make_cache(config).layers)
    return max(1, PREFILL_TOKENS // length) if roomy else 10**9
