"""Rows that a model reads on: each distinct prompt once, then the tokens that every row adds; rows may leave, or branch."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import torch
from transformers import Cache, PreTrainedModel

from ..engine.kvcache import branched, joined, make_cache, rows_at_once
from ..engine.prefix import Prefix, can_share
from ..models import Base
from ..text import left_pad


class Reader:
    """Rows of tokens: their cache, masks and positions, and the model's last hidden state of each, `hidden` (rows, hidden).

    Where several rows have the same prompt it is read once, and if the model allows it (`engine.prefix`) held once.

    Parameters
    ----------
    prompts : sequence of int arrays
        Tokens that each row begins with.
    branching : bool
        Rows will be selected more than once: hold each prompt apart from what comes after it, even if no two are alike.
    """

    def __init__(self, base: Base, prompts: Sequence[np.ndarray], branching: bool = False) -> None:
        self.model, self.pad_id, device = base.model, base.pad_id, base.model.device
        distinct = list({prompt.tobytes(): prompt for prompt in prompts}.values())
        number = {prompt.tobytes(): i for i, prompt in enumerate(distinct)}
        ids, mask = (torch.from_numpy(a).to(device) for a in left_pad(distinct, base.pad_id))  # (distinct, length)
        positions = (mask.cumsum(1) - 1).clamp(min=0)  # (distinct, length): padding does not count
        hidden, cache = _prefill(base.model, ids, mask, positions)
        self.prefix: Prefix | None = None
        self.n_prompts, self.prompt, self.own = (
            *ids.shape,
            0,
        )  # read once each, of so many tokens; and tokens after them
        self.hidden, self.cache, self.mask, self.positions = hidden, cache, mask, positions
        if len(distinct) == len(prompts) and not branching:
            return
        rows = torch.tensor([number[prompt.tobytes()] for prompt in prompts], device=device)
        if can_share(base.model, cache):
            self.prefix = Prefix.of(cache, mask, rows)
            self.cache, self.mask = make_cache(base.model.config, torch.float32), mask[:, :0]
            self.hidden, self.mask, self.positions = hidden[rows], self.mask[rows], positions[rows]
        else:
            self.select(rows)

    def select(self, rows: Sequence[int] | np.ndarray | torch.Tensor) -> None:
        """Go on with some of the rows, in any order; one that stands several times branches."""
        at = torch.as_tensor(rows, device=self.mask.device)
        self.cache.batch_select_indices(at)
        self._select(at)

    def _select(self, at: torch.Tensor) -> None:
        self.mask, self.positions, self.hidden = self.mask[at], self.positions[at], self.hidden[at]
        if self.prefix is not None:
            self.prefix = self.prefix.rows(at)

    def branch(self, rows: Sequence[int] | np.ndarray | torch.Tensor) -> Reader:
        """A reader of some of the rows, as by `select`; this one stays as it is."""
        at, twin = torch.as_tensor(rows, device=self.mask.device), copy.copy(self)
        twin.cache = branched(self.cache, at)
        twin._select(at)
        return twin

    def read(self, new: Sequence[Sequence[int]]) -> int:
        """Read new tokens of each row; how many a row they were, padding too.

        Where one row has more than another, the other's are padded on the left and masked like the prompts.
        """
        padded = left_pad([np.array(tokens, dtype=np.int64) for tokens in new], self.pad_id)
        ids, mask = (torch.from_numpy(a).to(self.mask.device) for a in padded)  # (rows, most new tokens)
        self.positions = self.positions[:, -1:] + mask.cumsum(1)
        self.mask = torch.cat([self.mask, mask], dim=1)
        self.hidden = _read(self.model, self.cache, ids, self.mask, self.positions, self.prefix)
        self.own += ids.shape[1]
        return ids.shape[1]


def _prefill(
    model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor
) -> tuple[torch.Tensor, Cache]:
    """Read the prompts, (batch, length) each, a few rows at a time: the last hidden states, (batch, hidden), and the cache."""
    caches, hidden = [], []
    at_once = rows_at_once(model.config, ids.shape[1])
    for first in range(0, len(ids), at_once):
        rows = slice(first, first + at_once)
        caches.append(make_cache(model.config))
        hidden.append(_read(model, caches[-1], ids[rows], mask[rows], positions[rows]))
    return torch.cat(hidden), joined(caches)


def _read(
    model: PreTrainedModel,
    cache: Cache,
    ids: torch.Tensor,
    mask: torch.Tensor,
    positions: torch.Tensor,
    prefix: Prefix | None = None,
) -> torch.Tensor:
    """Read new tokens, (batch, new), after those in the cache: the last hidden states, (batch, hidden)."""
    inputs = dict(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
    after = {} if prefix is None else {"prefix": prefix}  # only those architectures know it that can share one
    return model.base_model(**inputs, **after, use_cache=True).last_hidden_state[:, -1]
