"""The benchmark of sampling: twenty continuations of one series, ours beside those of `transformers`."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from ..data import Dataset
from ..evaluation.protocols import make_cases
from ..forecasting import generate
from ..ledger import Ledger
from ..models import Base
from ..text import Codec, fit_scale
from .timing import Row, rows_of, wait

SAMPLES, STEPS, PROMPT = 20, 20, 400


def compare_sampling(base: Base, dataset: Dataset, ledger: Ledger, rounds: int) -> list[Row]:
    """Seconds of twenty samples of twenty steps after 400 tokens, in turns; ours first, since theirs write as many tokens."""
    codec = Codec(fit_scale(dataset.part("train")))
    context = make_cases(dataset.part("validation"), codec, "P5", PROMPT)[0].context
    seconds: dict[str, list[float]] = {"transformers.generate": [], "shared prompt, constrained": []}
    for turn in range(rounds):
        started = time.perf_counter()
        made = generate(
            base, codec, [context] * SAMPLES, STEPS, 2, temperature=1.0, seed=turn, constrained=True, ledger=ledger
        )
        wait()
        between = time.perf_counter()
        sample_by_transformers(base, context, SAMPLES, max(len(g.text) for g in made), seed=turn)
        wait()
        ours, theirs = between - started, time.perf_counter() - between
        for side, one in zip(seconds, (theirs, ours), strict=True):
            seconds[side].append(one)
    return rows_of(seconds)


def sample_by_transformers(base: Base, context: str, n: int, new_tokens: int, seed: int) -> Sequence[str]:
    """As many samples of so many tokens, at temperature 1, by `transformers.generate`."""
    batch = base.tokenizer([context], return_tensors="pt", add_special_tokens=False).to(base.model.device)
    torch.manual_seed(seed)
    with torch.inference_mode():
        out = base.model.generate(  # type: ignore[operator]  # a causal model has it, not every PreTrainedModel
            **batch,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            num_return_sequences=n,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            pad_token_id=base.pad_id,
        )
    return base.tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :])
