"""Prompts that many rows go on from: their keys and values are held once, and a row's own cache holds what came after.

Twenty samples of one series, or the branches of a tree, read the same four hundred tokens before each of their own. Held once, these
meet the queries of all rows in one matrix product a head, and a row that splits in two copies only its own few tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from transformers import Cache, PreTrainedModel

from .kvcache import filled, plain_layers

LEAN = "lean"
"""Name of the attention that reads a prefix (`attention.attend_lean`), as `transformers` knows it."""

# Architectures whose attention hands on what the forward pass is called with, held against whole forward passes in the tests.
SHARING = ("qwen2", "llama")


@dataclass(frozen=True, eq=False)
class Prefix:
    """Keys and values of several prompts, in float32, and which of them each row goes on from."""

    layers: Sequence[tuple[torch.Tensor, torch.Tensor]]
    """Keys and values of each layer, (prompts, key-value heads, length, dimension) each."""
    padding: torch.Tensor | None
    """bool (prompts, 1, 1, length), true where there is no token; None where there is one everywhere."""
    place: torch.Tensor
    """int64 (rows,): where a row's queries stand among `slots` for each prompt."""
    slots: int
    """As many as the prompt with most rows has."""
    prompts: torch.Tensor
    """int64 (rows,): the prompt of each row."""
    aligned: bool = False
    """Whether rows stand as `place` would put them, and none is missing."""

    @classmethod
    def of(cls, cache: Cache, mask: torch.Tensor, prompts: torch.Tensor) -> Prefix:
        """Of prompts that were read into a cache, with their mask (prompts, length), and the prompt of each row, (rows,)."""
        layers = [(keys.float(), values.float()) for keys, values in filled(cache)]
        padding = None if mask.all() else (mask == 0)[:, None, None]
        return cls(layers, padding, prompts, 1, prompts).rows(torch.arange(len(prompts), device=prompts.device))

    def rows(self, rows: torch.Tensor) -> Prefix:
        """For some of the rows, in any order; a row may stand more than once."""
        prompts = self.prompts[rows]
        counts = torch.bincount(prompts, minlength=len(self.layers[0][0]))
        order = prompts.argsort(stable=True)
        rank = torch.empty_like(prompts)  # of a row among those of its prompt
        rank[order] = torch.arange(len(prompts), device=prompts.device) - (counts.cumsum(0) - counts)[prompts[order]]
        slots = int(counts.max())
        place = prompts * slots + rank
        aligned = len(place) == slots * len(counts) and bool((place.diff() == 1).all())
        return replace(self, prompts=prompts, place=place, slots=slots, aligned=aligned)

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Attention of new tokens over their row's prompt and over the row's own tokens, in float32.

        Parameters
        ----------
        query : (rows, heads, new tokens, dimension)
            Scaled.
        key, value : (rows, key-value heads, own tokens, dimension)
        mask : bool (rows, 1, new tokens, own tokens), optional
            By default each new token sees what came before it.

        Returns
        -------
        (rows, heads, new tokens, dimension)
        """
        (rows, heads, new, dim), (shared, own) = query.shape, key.shape[1:3]
        keys, values = self.layers[layer]
        group, length = heads // shared * new, keys.shape[2]
        query = query.float().reshape(rows, shared, group, dim)
        scores = (query @ key.mT).view(rows, shared, -1, new, own)
        if mask is not None:
            scores = scores.masked_fill(~mask[:, :, None], -torch.inf)
        elif new > 1:
            scores = scores.masked_fill(mask_of_later(new, own, scores.device), -torch.inf)
        old = self._gather(query) @ keys.mT  # (prompts, key-value heads, slots × group, length)
        if self.padding is not None:
            old = old.masked_fill(self.padding, -torch.inf)
        weights = torch.cat([old, self._gather(scores.view(rows, shared, group, own))], dim=-1).softmax(-1)
        out = self._scatter(weights[..., :length] @ values, group)
        out = out + self._scatter(weights[..., length:], group) @ value
        return out.reshape(rows, heads, new, dim)

    def _gather(self, x: torch.Tensor) -> torch.Tensor:
        """(rows, heads, group, size) → (prompts, heads, slots × group, size), zeros where a prompt has fewer rows."""
        _, heads, group, size = x.shape
        n = len(self.layers[0][0])
        slots = x if self.aligned else x.new_zeros(n * self.slots, *x.shape[1:]).index_copy_(0, self.place, x)
        return slots.view(n, self.slots, heads, group, size).transpose(1, 2).reshape(n, heads, -1, size)

    def _scatter(self, x: torch.Tensor, group: int) -> torch.Tensor:
        """The inverse: (prompts, heads, slots × group, size) → (rows, heads, group, size)."""
        n, heads, _, size = x.shape
        slots = x.view(n, heads, self.slots, group, size).transpose(1, 2).flatten(0, 1)
        return slots if self.aligned else slots[self.place]


def mask_of_later(new: int, own: int, device: torch.device) -> torch.Tensor:
    """True where one of the last `new` tokens of `own` would see a later one: bool (new, own)."""
    return torch.ones(new, own, dtype=torch.bool, device=device).triu(own - new + 1)


def can_share(model: PreTrainedModel, cache: Cache) -> bool:
    """Whether the rows of a model can go on from a prefix, inside `attend_lean`."""
    config = model.config
    return (
        config.model_type in SHARING
        and config._attn_implementation == LEAN
        and len(plain_layers(cache)) == len(cache.layers)
    )
