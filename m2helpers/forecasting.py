"""Forecasts: a series becomes text, the model writes on, and what it wrote is read strictly back into numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import DynamicCache

from .costs import generation_cost
from .files import UserError
from .models import Base
from .settings import LoraSettings
from .text import Codec, left_pad, tokenise


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
    adapted = {"lora_r": lora.lora_r, "target_modules": lora.target_modules} if lora else {}
    draws = torch.Generator(base.model.device).manual_seed(seed)
    ledger, results = base.ledger, [None] * len(ids)
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))  # alike lengths together: little padding
    for first in range(0, len(order), batch_size):
        rows = order[first : first + batch_size]
        prompt, most = max(len(ids[i]) for i in rows), n_steps * longest_step
        at_most = generation_cost(base.model.config, len(rows), prompt, most, **adapted)
        with ledger.reserve(base.spender, generate=at_most) as bill:
            written = _continue(base, [ids[i] for i in rows], separator, n_steps, most, temperature, draws)
            for i, tokens in zip(rows, written, strict=True):
                cost = generation_cost(base.model.config, 1, prompt, len(tokens), **adapted)
                bill.add("generate", cost)
                results[i] = Generated(base.tokenizer.decode(tokens, clean_up_tokenization_spaces=False), cost.flops)
    return results


def _continue(
    base: Base,
    prompts: list[np.ndarray],
    separator: int,
    n_separators: int,
    max_new_tokens: int,
    temperature: float,
    draws: torch.Generator,
) -> list[list[int]]:
    """Token ids written after each prompt, up to and including its last separator."""
    device = base.model.device
    input_ids, mask = (torch.from_numpy(a).to(device) for a in left_pad(prompts, base.pad_id))  # (batch, length)
    padded = not bool(mask.all())
    positions = (mask.cumsum(1) - 1).clamp(min=0)  # (batch, length): padding does not count
    cache = DynamicCache(config=base.model.config)
    written: list[list[int]] = [[] for _ in prompts]
    left = torch.full((len(prompts),), n_separators, device=device)  # separators still to write
    alive = list(range(len(prompts)))
    for _ in range(max_new_tokens):
        logits = base.model(
            input_ids=input_ids,
            attention_mask=mask if padded else None,
            position_ids=positions,
            past_key_values=cache,
            logits_to_keep=1,
        ).logits[:, -1]  # (alive, vocab)
        token = _choose(logits, temperature, draws)  # (alive,)
        for row, value in zip(alive, token.tolist(), strict=True):
            written[row].append(value)
        left = left - (token == separator).long()
        keep = torch.nonzero(left > 0).flatten()
        if not len(keep):
            break
        if len(keep) < len(alive):
            cache.batch_select_indices(keep)
            alive = [alive[i] for i in keep.tolist()]
            token, left, mask, positions = token[keep], left[keep], mask[keep], positions[keep]
        input_ids = token[:, None]  # (alive, 1)
        positions = positions[:, -1:] + 1
        mask = torch.cat([mask, torch.ones_like(input_ids)], dim=1)
    return written


def _choose(logits: torch.Tensor, temperature: float, draws: torch.Generator) -> torch.Tensor:
    """(batch, vocab) → (batch,)."""
    if temperature == 0:
        return logits.argmax(-1)
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
        If none of them parses.
    """
    drawn = forecast(base, codec, [series] * n_samples, steps, temperature=temperature, seed=seed, **options)
    valid = [f.values for f in drawn if f.valid]
    if not valid:
        raise UserError(
            f"none of {n_samples} sampled forecasts parsed whole; use a lower temperature or a trained model"
        )
    return np.stack(valid)
