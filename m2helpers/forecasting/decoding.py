"""Decoding: prompts are read once into a cache, and every row is continued token by token until it is done."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from transformers import Cache, PreTrainedModel

from ..engine.kvcache import joined, make_cache, rows_at_once
from ..files import UserError
from ..models import Base
from ..text import Grammar, left_pad, numeric_tokens


@dataclass(frozen=True)
class End:
    """Where a row is done."""

    separator: int
    """Token after each step."""
    n_separators: int
    """Separators to write."""
    max_new_tokens: int
    """Tokens after which it stops without them."""


Choose = Callable[[torch.Tensor], torch.Tensor]
"""Logits (batch, choices) → the choice of each row, (batch,)."""


class Rules:
    """A grammar and the head's part for its characters: only they are scored, and only those that may stand are chosen."""

    def __init__(self, grammar: Grammar, base: Base) -> None:
        tokens = numeric_tokens(grammar.codec, base.tokenizer)
        head = base.model.get_output_embeddings()
        self.tokens, self.next, self.forced = tokens.tolist(), grammar.next.tolist(), grammar.forced.tolist()
        self.weight = head.weight[tokens]  # (characters, hidden)
        self.bias = 0 if head.bias is None else head.bias[tokens]  # (characters,)
        self.allowed = torch.from_numpy(grammar.next >= 0).to(base.model.device)  # (states, characters)

    def score(self, hidden: torch.Tensor, states: list[int]) -> torch.Tensor:
        """(batch, hidden) → logits (batch, characters), minus infinity where a character may not stand."""
        logits = F.linear(hidden, self.weight).float() + self.bias
        return logits.masked_fill(~self.allowed[states], -torch.inf)


class _Batch:
    """Rows while they are continued: what each has written, and the cache of those that are not done."""

    def __init__(self, base: Base, prompts: list[np.ndarray], end: End) -> None:
        self.model, self.pad_id, self.end = base.model, base.pad_id, end
        device = base.model.device
        ids, self.mask = (torch.from_numpy(a).to(device) for a in left_pad(prompts, base.pad_id))  # (batch, length)
        self.positions = (self.mask.cumsum(1) - 1).clamp(min=0)  # (batch, length): padding does not count
        self.written: list[list[int]] = [[] for _ in prompts]
        self.read = [0] * len(prompts)  # tokens, padding too, after the prompt
        self.left = [end.n_separators] * len(prompts)  # separators still to write
        self.alive = list(range(len(prompts)))  # rows that are not done
        self.hidden, self.cache = _prefill(base.model, ids, self.mask, self.positions)  # (alive, hidden)

    def write(self, new: list[list[int]]) -> None:
        """Add the tokens chosen for each row alive; those that are done leave, and the others' tokens are read.

        Where one row has more new tokens than another, the other's are padded on the left and masked like the prompts.
        """
        for row, tokens in zip(self.alive, new, strict=True):
            self.written[row] += tokens
            self.left[row] -= tokens.count(self.end.separator)
        most = self.end.max_new_tokens
        keep = [i for i, row in enumerate(self.alive) if self.left[row] and len(self.written[row]) < most]
        device, before = self.mask.device, len(self.alive)
        self.alive, new = [self.alive[i] for i in keep], [new[i] for i in keep]
        if not keep:
            return
        if len(keep) < before:
            self.cache.batch_select_indices(torch.tensor(keep, device=device))
            self.mask, self.positions = self.mask[keep], self.positions[keep]
        padded = left_pad([np.array(tokens) for tokens in new], self.pad_id)
        ids, new_mask = (torch.from_numpy(a).to(device) for a in padded)  # (alive, most new tokens)
        for row in self.alive:
            self.read[row] += ids.shape[1]
        self.positions = self.positions[:, -1:] + new_mask.cumsum(1)
        self.mask = torch.cat([self.mask, new_mask], dim=1)
        self.hidden = _read(self.model, self.cache, ids, self.mask, self.positions)


def continue_prompts(
    base: Base,
    prompts: list[np.ndarray],
    end: End,
    choose: Choose,
    rules: Rules | None,
    states: list[int],
) -> tuple[list[list[int]], list[int]]:
    """Token ids written after each prompt, up to and including its last separator, and how many were read, padding too.

    `states` are those of the grammar after each prompt, and change.
    """
    batch = _Batch(base, prompts, end)
    if rules:
        _write_by_rules(batch, choose, rules, states)
    else:
        _write_freely(batch, choose)
    return batch.written, batch.read


def _write_freely(batch: _Batch, choose: Choose) -> None:
    """One token a pass, any of the vocabulary."""
    head = batch.model.get_output_embeddings()
    while batch.alive:
        batch.write([[token] for token in choose(head(batch.hidden)).tolist()])


def _write_by_rules(batch: _Batch, choose: Choose, rules: Rules, states: list[int]) -> None:
    """Only tokens that may stand; where one alone may, it joins the token before it in the same forward pass."""
    while batch.alive:
        logits = rules.score(batch.hidden, [states[row] for row in batch.alive])  # (alive, characters)
        new: list[list[int]] = []
        for row, choice in zip(batch.alive, choose(logits).tolist(), strict=True):
            tokens: list[int] = []
            while choice >= 0:
                tokens.append(rules.tokens[choice])
                states[row] = rules.next[states[row]][choice]
                left = batch.left[row] - tokens.count(batch.end.separator)
                choice = rules.forced[states[row]] if left else -1
            new.append(tokens)
        batch.write(new)


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
    model: PreTrainedModel, cache: Cache, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """Read new tokens, (batch, new), after those in the cache: the last hidden states, (batch, hidden)."""
    inputs = dict(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
    return model.base_model(**inputs, use_cache=True).last_hidden_state[:, -1]


def choose(logits: torch.Tensor, temperature: float, draws: torch.Generator) -> torch.Tensor:
    """(batch, vocab) → (batch,).

    Raises
    ------
    UserError
        If a row's largest logit is NaN or infinite. A grammar's minus infinity elsewhere is as it should be.
    """
    likeliest = logits.argmax(-1)  # NaN counts as the largest
    if not logits.gather(-1, likeliest[:, None]).isfinite().all():
        raise UserError(
            "the model's output is not a number: its weights are damaged or overflow; fetch or copy the model again"
        )
    if temperature == 0:
        return likeliest
    return torch.multinomial((logits.float() / temperature).softmax(-1), 1, generator=draws).flatten()
