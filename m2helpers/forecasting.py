"""Forecasts: a series becomes text, the model writes on, and what it wrote is read strictly back into numbers."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypedDict, Unpack

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from transformers import Cache, PreTrainedModel

from .engine.attention import attend_lean
from .engine.kvcache import joined, make_cache, rows_at_once
from .files import UserError
from .flops.costs import Adaptation, generation_cost
from .ledger import Ledger, default_ledger, spender_of
from .models import Base
from .settings import LoraSettings
from .text import Codec, Grammar, left_pad, numeric_tokens, tokenise


@dataclass(frozen=True)
class Generated:
    """One continuation."""

    text: str
    """What the model wrote."""
    flops: int
    """What it cost (prefill once, then token by token), in the exact account."""


@dataclass(frozen=True)
class Forecast:
    """One forecast, read back from text."""

    values: np.ndarray
    """float64 (steps that parsed, variables), in the units of the series; never padded."""
    valid: bool
    """Whether all the steps asked for parsed."""
    text: str
    """What the model wrote."""
    flops: int


class Options(TypedDict, total=False):
    """How to decode, as in `generate`."""

    batch_size: int
    lora: LoraSettings | None
    constrained: bool
    ledger: Ledger | None


class SamplingOptions(Options, total=False):
    """And how to choose."""

    temperature: float
    seed: int


@torch.inference_mode()
def generate(
    base: Base,
    codec: Codec,
    contexts: Sequence[str],
    n_steps: int,
    n_variables: int,
    *,
    batch_size: int = 50,
    temperature: float = 0.0,
    seed: int = 0,
    lora: LoraSettings | None = None,
    constrained: bool = False,
    ledger: Ledger | None = None,
) -> list[Generated]:
    """Continue each text until it has `n_steps` more step separators, with a KV cache, many at once, and charge it.

    Contexts of different lengths are padded on the left and masked. A row leaves its batch when it is done. What is decoded,
    how, and who pays are all arguments, so they are many.

    Parameters
    ----------
    contexts : sequence of str
        Encoded text; may begin or end inside a number.
    n_steps : int
        Step separators to write. A row that has not written them after `n_steps` of the longest possible steps stops.
    n_variables : int
        Variables a step.
    temperature : float
        0 takes the likeliest token; above 0 draws from the softmax of logits / temperature.
    seed : int
        Of those draws.
    lora : LoraSettings, optional
        Unmerged LoRA updates the model carries, for the account; None when there are none or they are merged.
    constrained : bool
        Score only the characters of numeric text and choose only among those that the grammar allows, so that every
        continuation parses. Without it, how often a model keeps to the grammar is part of what is measured.
    ledger : Ledger, optional
        Where it is charged; by default the base's own (`default_ledger`).

    Returns
    -------
    list of Generated
        In the order of the contexts.
    """
    ids, window = _prompts(base, codec, contexts, n_steps, n_variables)
    separator = int(tokenise([codec.step_separator], base.tokenizer)[0][0])
    longest_step = n_variables * (1 + codec.max_integer_digits + codec.precision + 2)
    grammar = Grammar(codec, n_variables) if constrained else None
    rules, states = (_Rules(grammar, base), [grammar.walk(text) for text in contexts]) if grammar else (None, [])
    scored = len(grammar.alphabet) if grammar else None
    adapted = Adaptation(lora.lora_r, lora.target_modules, scored) if lora else Adaptation(vocabulary=scored)
    draws = torch.Generator(base.model.device).manual_seed(seed)
    choose = partial(_choose, temperature=temperature, draws=draws)
    ledger, spender, results = ledger or default_ledger(base), spender_of(base), dict[int, Generated]()
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))  # alike lengths together: little padding
    for first in range(0, len(order), batch_size):
        rows = order[first : first + batch_size]
        prompt = max(len(ids[i]) for i in rows)
        most = min(n_steps * longest_step, window - prompt + 1)
        # With rules a pass reads one token of a row, or two where the second is forced in some row.
        at_most = generation_cost(base.model.config, len(rows), prompt, most * (2 if rules else 1), adapted)
        with ledger.reserve(spender, generate=at_most) as bill:
            prompts, begin = [ids[i] for i in rows], [states[i] for i in rows] if rules else []
            try:
                with attend_lean(base.model):
                    written, read = _continue(base, prompts, _End(separator, n_steps, most), choose, rules, begin)
            except BaseException:  # stopped, or out of memory: nobody knows how far it got
                bill.add("generate", at_most)
                raise
            for i, tokens, n in zip(rows, written, read, strict=True):
                cost = generation_cost(base.model.config, 1, prompt, n + 1, adapted)  # the last is never read
                bill.add("generate", cost)
                text = str(base.tokenizer.decode(tokens, clean_up_tokenization_spaces=False))  # one row's is a str
                results[i] = Generated(text, cost.flops)
    return [results[i] for i in range(len(ids))]


def _prompts(
    base: Base, codec: Codec, contexts: Sequence[str], n_steps: int, n_variables: int
) -> tuple[list[np.ndarray], int]:
    """The tokens of each context, and how many the model reads at most; what cannot be continued is refused."""
    if n_steps < 1:
        raise UserError(f"cannot forecast {n_steps} steps: ask for at least 1")
    ids = tokenise(contexts, base.tokenizer)
    if any(len(row) == 0 for row in ids):
        raise UserError("a context is empty: give at least one step")
    longest, window = max(map(len, ids), default=0), getattr(base.model.config, "max_position_embeddings", sys.maxsize)
    needed = longest + n_steps * codec.shortest_step(n_variables) - 1  # the last token written is never read
    if needed > window:
        raise UserError(
            f"a series of {longest:,} tokens and {n_steps:,} more steps need at least {needed:,} tokens, and "
            f"{base.short_name} reads {window:,} at most; give fewer steps of the series, or ask for fewer"
        )
    return ids, window


@dataclass(frozen=True)
class _End:
    """Where a row is done."""

    separator: int
    """Token after each step."""
    n_separators: int
    """Separators to write."""
    max_new_tokens: int
    """Tokens after which it stops without them."""


Choose = Callable[[torch.Tensor], torch.Tensor]
"""Logits (batch, choices) → the choice of each row, (batch,)."""


class _Rules:
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

    def __init__(self, base: Base, prompts: list[np.ndarray], end: _End) -> None:
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


def _continue(
    base: Base,
    prompts: list[np.ndarray],
    end: _End,
    choose: Choose,
    rules: _Rules | None,
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


def _write_by_rules(batch: _Batch, choose: Choose, rules: _Rules, states: list[int]) -> None:
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


def _choose(logits: torch.Tensor, temperature: float, draws: torch.Generator) -> torch.Tensor:
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


def forecast(
    base: Base, codec: Codec, series: Sequence[ArrayLike], steps: int, **options: Unpack[SamplingOptions]
) -> list[Forecast]:
    """Forecast each series by `steps`.

    Parameters
    ----------
    series : sequence of array_like, each (n_steps, n_variables)
        In their own units; lengths may differ, variables may not.
    steps : int
        Steps ahead.
    **options
        As in `generate`.

    Returns
    -------
    list of Forecast
    """
    contexts = [codec.encode(values) for values in series]  # refuses a wrong shape
    n_variables = np.shape(series[0])[1]
    forecasts = []
    for result in generate(base, codec, contexts, steps, n_variables, **options):
        values, _ = codec.decode(result.text, n_variables)
        forecasts.append(Forecast(values[:steps], len(values) >= steps, result.text, result.flops))
    return forecasts


def sample_forecasts(
    base: Base,
    codec: Codec,
    series: ArrayLike,
    steps: int,
    n_samples: int,
    temperature: float = 0.9,
    seed: int = 0,
    **options: Unpack[Options],
) -> np.ndarray:
    """Draw several forecasts of one series and keep those that parse whole: (at most n_samples, steps, variables).

    Raises
    ------
    UserError
        If none is asked for.
    """
    if n_samples < 1:
        raise UserError(f"cannot draw {n_samples} samples: ask for at least 1")
    drawn = forecast(base, codec, [series] * n_samples, steps, temperature=temperature, seed=seed, **options)
    return np.array([f.values for f in drawn if f.valid]).reshape(-1, steps, np.shape(series)[1])
