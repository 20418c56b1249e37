"""Forecasts: a series becomes text, the model writes on, and what it wrote is read strictly back into numbers."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict, Unpack

import numpy as np
import torch
from numpy.typing import ArrayLike
from tqdm.auto import tqdm

from ..engine.attention import attend_lean
from ..files import UserError
from ..flops.costs import Adaptation, continuation_cost, generation_cost
from ..ledger import Ledger, default_ledger, spender_of
from ..models import Base
from ..settings import LoraSettings
from ..text import Codec, Grammar, tokenise
from .captured import can_capture, continue_captured
from .decoding import Chooser, End, Rules, continue_prompts, uniform_numbers

PATIENCE = 5.0  # seconds before a bar says how far it is


@dataclass(frozen=True)
class Generated:
    """One continuation."""

    text: str
    """What the model wrote."""
    flops: int
    """What it cost (prefill once, then token by token), in the exact account. Rows of one context share its prefill evenly."""


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

    Contexts of different lengths are padded on the left and masked; a context that stands several times is read once a batch. A row
    leaves its batch when it is done. What is decoded, how, and who pays are all arguments, so they are many.

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
        Of those draws. What a row draws follows from it, the context, and how many rows of that came before, and from nothing else.
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
    ids, window = encode_prompts(base, codec, contexts, n_steps, n_variables)
    separator = int(tokenise([codec.step_separator], base.tokenizer)[0][0])
    longest_step = n_variables * (1 + codec.max_integer_digits + codec.precision + 2)
    grammar = Grammar(codec, n_variables) if constrained else None
    rules, states = (Rules(grammar, base), [grammar.walk(text) for text in contexts]) if grammar else (None, [])
    scored = len(grammar.alphabet) if grammar else None
    adapted = adaptation(lora, scored)
    config, results = base.model.config, dict[int, Generated]()
    ledger, spender = ledger or default_ledger(base), spender_of(base)
    first_of = {context: i for i, context in reversed(list(enumerate(contexts)))}
    uniform = uniform_numbers(contexts, n_steps * longest_step if temperature else 0, seed, base.model.device)
    # Alike lengths together: little padding; and one text's rows side by side.
    order = sorted(range(len(ids)), key=lambda i: (len(ids[i]), first_of[contexts[i]]))
    bar = tqdm(total=len(order) * n_steps, desc="forecasting", unit="step", delay=PATIENCE, leave=False)
    for first in range(0, len(order), batch_size):
        rows = order[first : first + batch_size]
        prompt = max(len(ids[i]) for i in rows)
        most = min(n_steps * longest_step, window - prompt + 1)
        alike = Counter(contexts[i] for i in rows)
        prefill = generation_cost(config, 1, prompt, 1, adapted)
        # With rules a pass reads one token of a row, or two where the second is forced in some row.
        at_most = prefill * len(alike) + continuation_cost(
            config, prompt, most * (2 if rules else 1) - 1, adapted
        ) * len(rows)
        with ledger.reserve(spender, generate=at_most) as bill:
            prompts, begin = [ids[i] for i in rows], [states[i] for i in rows] if rules else []
            chooser = Chooser(temperature, uniform[rows])
            try:
                with attend_lean(base.model):
                    write = continue_captured if can_capture(base) else continue_prompts
                    written, read = write(
                        base, prompts, End(separator, n_steps, most), chooser, rules, begin, bar.update
                    )
            except BaseException:  # stopped, or out of memory: nobody knows how far it got
                bill.add("generate", at_most)
                raise
            shares = {context: prefill.shared(n) for context, n in alike.items()}
            for i, tokens, n in zip(rows, written, read, strict=True):
                cost = shares[contexts[i]].pop() + continuation_cost(config, prompt, n, adapted)
                bill.add("generate", cost)
                text = str(base.tokenizer.decode(tokens, clean_up_tokenization_spaces=False))  # one row's is a str
                results[i] = Generated(text, cost.flops)
    bar.close()
    return [results[i] for i in range(len(ids))]


def adaptation(lora: LoraSettings | None, scored: int | None) -> Adaptation:
    """What the price of a pass depends on: the updates that the model carries, and how many tokens are scored."""
    return Adaptation(lora.lora_r, lora.target_modules, scored) if lora else Adaptation(vocabulary=scored)


def encode_prompts(
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
    (drawn,) = sample_many(base, codec, [series], steps, n_samples, temperature=temperature, seed=seed, **options)
    return drawn


def sample_many(
    base: Base,
    codec: Codec,
    series: Sequence[ArrayLike],
    steps: int,
    n_samples: int,
    **options: Unpack[SamplingOptions],
) -> list[np.ndarray]:
    """As many forecasts of each of several series, and of each those that parse whole: (at most n_samples, steps, variables).

    Options as in `generate`. What is drawn for one series does not depend on the others.
    """
    if n_samples < 1:
        raise UserError(f"cannot draw {n_samples} samples: ask for at least 1")
    drawn = forecast(base, codec, [values for values in series for _ in range(n_samples)], steps, **options)
    return [
        np.array([f.values for f in drawn[i : i + n_samples] if f.valid]).reshape(-1, steps, np.shape(series[0])[1])
        for i in range(0, len(drawn), n_samples)
    ]
