"""The cache of keys and values that decoding reads: its room is made once, and no key is copied for the heads that share it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface, Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

GROUPED = "grouped"
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


def grouped_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **options,
) -> tuple[torch.Tensor, None]:
    """Masked attention of heads that share keys, as one product a group (Ainslie et al., *GQA*, 2023).

    `transformers` copies keys and values for every head of a group when there is a mask and more than one new token. Here
    the queries of a group are stacked instead; where that gains nothing, `transformers` does it.

    Parameters
    ----------
    query : (batch, heads, new tokens, head dimension)
    key, value : (batch, key-value heads, all tokens, head dimension)
    attention_mask : (batch, 1, new tokens, all tokens), optional
    """
    (batch, heads, new, dim), shared = query.shape, key.shape[1]
    if attention_mask is None or new == 1 or heads == shared or attention_mask.shape[1] != 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
    stacked = query.reshape(batch, shared, heads // shared * new, dim)
    mask = attention_mask.repeat(1, 1, heads // shared, 1)  # (batch, 1, heads of a group × new, all)
    out = F.scaled_dot_product_attention(stacked, key, value, attn_mask=mask, scale=scaling)
    return out.reshape(batch, heads, new, dim).transpose(1, 2).contiguous(), None


AttentionInterface.register(GROUPED, grouped_attention)
AttentionMaskInterface.register(GROUPED, sdpa_mask)


@contextmanager
def grouped(model: PreTrainedModel) -> Iterator[None]:
    """Let a model attend with `grouped_attention`, if it goes by PyTorch's fused attention otherwise."""
    before = model.config._attn_implementation
    if before == "sdpa":
        model.config._attn_implementation = GROUPED
    try:
        yield
    finally:
        model.config._attn_implementation = before
