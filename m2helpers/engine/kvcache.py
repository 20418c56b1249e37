"""The cache of keys and values that decoding reads: its room is made once, for many tokens."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

PREFILL_TOKENS = 4096  # of prompts, read in one pass
SPARE = 64  # tokens of room beyond what is needed


class _RoomyLayer(DynamicLayer):
    """One layer's keys and values, written into room that is made for many tokens at once: (rows, heads, room, dimension).

    `keys` and `values` are what is filled of it, kept in `kept_as` if that is given.
    """

    def __init__(self, kept_as: torch.dtype | None = None) -> None:
        super().__init__()
        self.kept_as = kept_as

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Each (rows, key-value heads, new tokens, head dimension) → the same of all tokens so far."""
        if self.kept_as:
            key_states, value_states = key_states.to(self.kept_as), value_states.to(self.kept_as)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._room = [x[:, :, :0] for x in (key_states, value_states)]
            self._show(0)
        first = self._filled
        stop = first + key_states.shape[2]
        if stop > self._room[0].shape[2]:
            self._move(slice(None), stop + SPARE)
        for room, new in zip(self._room, (key_states, value_states), strict=True):
            room[:, :, first:stop] = new
        return self._show(stop)

    @property
    def _filled(self) -> int:
        """Tokens so far."""
        return 0 if self.keys is None else self.keys.shape[2]

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        if self.is_initialized:  # a row may stand more than once
            self._move(indices, self._room[0].shape[2])

    def branch(self, rows: torch.Tensor) -> _RoomyLayer:
        """Some of the rows in a layer of their own; this one stays as it is."""
        twin = copy.copy(self)  # a move makes new room and leaves the old alone
        twin.batch_select_indices(rows)
        return twin

    def _move(self, rows: torch.Tensor | slice, length: int) -> None:
        filled = self._filled
        self._room = [_room([x[:, :, :filled][rows]], length) for x in self._room]
        self._show(filled)

    def _show(self, filled: int) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = (room[:, :, :filled] for room in self._room)
        self.keys, self.values = keys, values
        return keys, values

    def add_rows(self, others: Sequence[_RoomyLayer]) -> None:
        """Take in the rows of other layers that hold as many tokens."""
        layers, filled = [self, *others], self._filled
        self._room = [_room([layer._room[i][:, :, :filled] for layer in layers], filled + SPARE) for i in (0, 1)]
        self._show(filled)


class _PlacedLayer(DynamicLayer):
    """One layer's keys and values in a room that stays, (rows, heads, room, dimension): new tokens go to places of their row."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, places: torch.Tensor) -> None:
        super().__init__()
        self.keys, self.values, self.places, self.is_initialized = keys, values, places, True
        self.rows = torch.arange(len(places), device=places.device)[:, None]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Each (rows, key-value heads, new tokens, head dimension) → the whole room; a mask says what of it is read."""
        assert self.keys is not None and self.values is not None
        self.keys[self.rows, :, self.places] = key_states.transpose(1, 2)
        self.values[self.rows, :, self.places] = value_states.transpose(1, 2)
        return self.keys, self.values


def _room(parts: Sequence[torch.Tensor], length: int) -> torch.Tensor:
    """Rows of several tensors, one after the other, with room for `length` tokens each."""
    _, heads, filled, dim = parts[0].shape
    room = parts[0].new_empty(sum(map(len, parts)), heads, length, dim)
    torch.cat(list(parts), out=room[:, :, :filled])
    return room


def make_cache(config: PreTrainedConfig, kept_as: torch.dtype | None = None) -> Cache:
    """An empty cache; layers with a sliding window keep the one `transformers` gives them."""
    cache = DynamicCache(config=config)
    cache.layers = [_RoomyLayer(kept_as) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def placed_cache(
    config: PreTrainedConfig, rooms: Sequence[tuple[torch.Tensor, torch.Tensor]], places: torch.Tensor
) -> Cache:
    """A cache over rooms for keys and values of each layer, (rows, heads, room, dimension) each, that never moves.

    `places` int64 (rows, new tokens) say where in its room each row's next tokens go; they are changed in place.
    """
    cache = DynamicCache(config=config)
    cache.layers = [_PlacedLayer(*room, places) for room in rooms]
    return cache


def joined(caches: Sequence[Cache]) -> Cache:
    """One cache with the rows of several that `make_cache` made and that hold as many tokens each."""
    first, *others = caches
    if others:
        for layer, *more in zip(*map(plain_layers, caches), strict=True):
            layer.add_rows(more)
    return first


def branched(cache: Cache, rows: torch.Tensor) -> Cache:
    """A cache with some rows of another, in any order, each as often as it stands; the other stays as it is."""
    twin = copy.copy(cache)
    twin.layers = []
    for layer in cache.layers:
        if isinstance(layer, _RoomyLayer):
            twin.layers.append(layer.branch(rows))
        else:
            layer = copy.deepcopy(layer)
            layer.batch_select_indices(rows)  # type: ignore[union-attr]  # layers of attention have it
            twin.layers.append(layer)
    return twin


def rows_at_once(config: PreTrainedConfig, length: int) -> int:
    """How many prompts of some length to read in one pass: few, since large tensors are slow to allocate; all, if need be."""
    cache = make_cache(config)
    return max(1, PREFILL_TOKENS // length) if len(plain_layers(cache)) == len(cache.layers) else 10**9


def plain_layers(cache: Cache) -> list[_RoomyLayer]:
    """The layers of a cache that keep all tokens."""
    return [layer for layer in cache.layers if isinstance(layer, _RoomyLayer)]


def filled(cache: Cache) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values of each layer that keeps all tokens, (rows, heads, tokens, dimension), once something was read."""
    return [(x.keys, x.values) for x in plain_layers(cache) if x.keys is not None and x.values is not None]
