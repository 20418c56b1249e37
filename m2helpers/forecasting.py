"""Forecasts: a series becomes text, the model writes on, and what it wrote is read strictly back into numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from transformers import Cache, PreTrainedModel

from .engine.attention import attend_lean
from .engine.kvcache import joined, make_cache, rows_at_once
from .files import UserError
from .flops.costs import generation_cost
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

    Contexts of different lengths are padded on the left and masked. A row leaves its batch when it is done.

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
    if n_steps < 1:
        raise UserError(f"cannot forecast {n_steps} steps: ask for at least 1")
    ids = tokenise(contexts, base.tokenizer)
    if any(len(row) == 0 for row in ids):
        raise UserError("a context is empty: give at least one step")
    separator = int(tokenise([codec.step_separator], base.tokenizer)[0][0])
    longest_step = n_variables * (1 + codec.max_integer_digits + codec.precision + 2)
    longest, window = max(map(len, ids), default=0), getattr(base.model.config, "max_position_embeddings", math.inf)
    needed = longest + n_steps * codec.shortest_step(n_variables) - 1  # the last token written is never read
    if needed > window:
        raise UserError(
            f"a series of {longest:,} tokens and {n_steps:,} more steps need at least {needed:,} tokens, and "
            f"{base.short_name} reads {window:,} at most; give fewer steps of the series, or ask for fewer"
        )
    adapted = {"lora_r": lora.lora_r, "target_modules": lora.target_modules} if lora else {}
    grammar = Grammar(codec, n_variables) if constrained else None
    adapted["vocabulary"] = len(grammar.alphabet) if grammar else None
    rules, states = (_Rules(grammar, base), [grammar.walk(text) for text in contexts]) if grammar else (None, [])
    draws = torch.Generator(base.model.device).manual_seed(seed)
    ledger, spender, results = ledger or default_ledger(base), spender_of(base), [None] * len(ids)
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))  # alike lengths together: little padding
    for first in range(0, len(order), batch_size):
        rows = order[first : first + batch_size]
        prompt = max(len(ids[i]) for i in rows)
        most = min(n_steps * longest_step, window - prompt + 1)
        # With rules a pass reads one token of a row, or two where the second is forced in some row.
        at_most = generation_cost(base.model.config, len(rows), prompt, most * (2 if rules else 1), **adapted)
        with ledger.reserve(spender, generate=at_most) as bill:
            prompts, begin = [ids[i] for i in rows], [states[i] for i in rows] if rules else []
            try:
                with attend_lean(base.model):
                    written, read = _continue(base, prompts, separator, n_steps, most, temperature, draws, rules, begin)
            except BaseException:  # stopped, or out of memory: nobody knows how far it got
                bill.add("generate", at_most)
                raise
            for i, tokens, n in zip(rows, written, read, strict=True):
                cost = generation_cost(base.model.config, 1, prompt, n + 1, **adapted)  # the last is never read
                bill.add("generate", cost)
                results[i] = Generated(base.tokenizer.decode(tokens, clean_up_tokenization_spaces=False), cost.flops)
    return results


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


def _continue(
    base: Base,
    prompts: list[np.ndarray],
    separator: int,
    n_separators: int,
    max_new_tokens: int,
    temperature: float,
    draws: torch.Generator,
    rules: _Rules | None = None,
    states: Sequence[int] = (),
) -> tuple[list[list[int]], list[int]]:
    """Token ids written after each prompt, up to and including its last separator, and how many were read, padding too.

    With rules, tokens that may not stand are never chosen, and where one alone may, it joins the token before it
    in the same forward pass. Rows with fewer such tokens are padded on the left, masked like the padding of the prompts.
    """
    device = base.model.device
    ids, mask = (torch.from_numpy(a).to(device) for a in left_pad(prompts, base.pad_id))  # (batch, length)
    positions = (mask.cumsum(1) - 1).clamp(min=0)  # (batch, length): padding does not count
    written: list[list[int]] = [[] for _ in prompts]
    left, read = [n_separators] * len(prompts), [0] * len(prompts)  # separators still to write, tokens read
    states, alive = list(states), list(range(len(prompts)))
    head = base.model.get_output_embeddings()
    hidden, cache = _prefill(base.model, ids, mask, positions)  # (batch, hidden)
    while True:
        # (alive, characters) or (alive, vocab)
        logits = rules.score(hidden, [states[row] for row in alive]) if rules else head(hidden)
        new: list[list[int]] = []
        for row, choice in zip(alive, _choose(logits, temperature, draws).tolist(), strict=True):
            tokens = []
            while choice >= 0:
                tokens.append(rules.tokens[choice] if rules else choice)
                left[row] -= tokens[-1] == separator
                if rules:
                    states[row] = rules.next[states[row]][choice]
                choice = rules.forced[states[row]] if rules and left[row] else -1
            written[row] += tokens
            new.append(tokens)
        keep = [i for i, row in enumerate(alive) if left[row] and len(written[row]) < max_new_tokens]
        if not keep:
            return written, read
        if len(keep) < len(alive):
            cache.batch_select_indices(torch.tensor(keep, device=device))
            alive, new = [alive[i] for i in keep], [new[i] for i in keep]
            mask, positions = mask[keep], positions[keep]
        new_ids, new_mask = left_pad([np.array(tokens) for tokens in new], base.pad_id)  # (alive, most new tokens)
        ids, new_mask = torch.from_numpy(new_ids).to(device), torch.from_numpy(new_mask).to(device)
        for row in alive:
            read[row] += ids.shape[1]
        positions = positions[:, -1:] + new_mask.cumsum(1)
        mask = torch.cat([mask, new_mask], dim=1)
        hidden = _read(base.model, cache, ids, mask, positions)


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


def forecast(base: Base, codec: Codec, series: Sequence[np.ndarray], steps: int, **options) -> list[Forecast]:
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
    series: np.ndarray,
    steps: int,
    n_samples: int,
    temperature: float = 0.9,
    seed: int = 0,
    **options,
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
