"""Measuring a model, and the baselines, under a protocol."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from tqdm.auto import tqdm

from ..data import Dataset
from ..forecasting import generate
from ..ledger import Ledger, default_ledger
from ..models import Base
from ..settings import LoraSettings
from ..text import Codec
from .baselines import BASELINES, run_baselines
from .protocols import HORIZONS, P5_CONTEXTS, compared, make_cases, numeric_context
from .scores import Result, score


def evaluate(
    base: Base,
    codec: Codec,
    dataset: Dataset,
    protocol: str,
    *,
    split: str = "test",
    contexts: Sequence[int] = P5_CONTEXTS,
    limit: int | None = None,
    lora: LoraSettings | None = None,
    run: str | None = None,
    seed: int | None = None,
    batch_size: int = 50,
    constrained: bool = False,
    ledger: Ledger | None = None,
) -> list[Result]:
    """Run a protocol over a split: one result for each context length.

    Parameters
    ----------
    base, codec
        The model, and the text it was trained with: the scale is the run's own, never fitted again here.
    contexts : sequence of int
        Tokens of context; P5 only.
    limit : int, optional
        Only the first so many series of the split, for a quick look.
    lora : LoraSettings, optional
        Unmerged updates the model carries, for the account.
    run, seed
        Recorded with the result.
    constrained : bool
        As in `generate`: for a run that was trained with the numeric head, whose other characters were never scored.
    ledger : Ledger, optional
        Where it is charged; by default the base's own (`default_ledger`).
    """
    trajectories = dataset.part(split)[:limit]
    lengths = contexts if protocol == "P5" else [HORIZONS.get(protocol, (0,))[0]]
    cases_of = {n: make_cases(trajectories, codec, protocol, n) for n in lengths}  # refused before anything is spent
    ledger = ledger or default_ledger(base)  # opened once, not for every batch
    results, how = [], dict(batch_size=batch_size, lora=lora, constrained=constrained, ledger=ledger)
    for context, cases in cases_of.items():
        n_variables = trajectories.shape[2]
        started, forecasts, flops = time.perf_counter(), [], 0
        for first in tqdm(range(0, len(cases), batch_size), desc=f"{protocol} {context}", unit="batch", leave=False):
            batch = cases[first : first + batch_size]
            steps = batch[0].skip + len(batch[0].truth)
            for case, out in zip(
                batch,
                generate(base, codec, [c.context for c in batch], steps, n_variables, **how),
                strict=True,
            ):
                forecasts.append(compared(codec, out.text, case.skip, n_variables))
                flops += out.flops
        seconds = time.perf_counter() - started
        about = dict(
            protocol=protocol, split=split, context=context, precision=codec.precision, seed=seed, scale=codec.scale
        )
        spent = dict(flops=flops, seconds=round(seconds, 2), model=base.name, run=run, data_sha256=dataset.sha256)
        which = dict(base_sha256=base.sha256, constrained=constrained)
        results.append(Result(**about, **spent, **which, **score(cases, forecasts)))
    return results


def evaluate_baselines(
    dataset: Dataset,
    codec: Codec,
    protocol: str,
    *,
    split: str = "test",
    contexts: Sequence[int] = P5_CONTEXTS,
    cache: Path,
) -> list[Result]:
    """The baselines on the same windows: last value, vector autoregression, and the ODE fit.

    They see the whole steps of each context as numbers, read from its text. Forecasts are cached under the data's hash.
    """
    dt = float(dataset.time[1] - dataset.time[0])
    trajectories = dataset.part(split)
    results = []
    for context in contexts if protocol == "P5" else [HORIZONS[protocol][0]]:
        cases = make_cases(trajectories, codec, protocol, context)
        known = [numeric_context(codec, case, trajectories.shape[2]) for case in cases]
        steps = [case.skip + len(case.truth) for case in cases]
        decimals = "" if codec.precision == 2 else f"-p{codec.precision}"  # other texts hold other contexts
        key = f"{protocol}-{split}-{context}{decimals}-{dataset.sha256[:16]}"
        forecasts = run_baselines(list(zip(known, steps, strict=True)), dt, cache, key, progress=True)
        for name in BASELINES:
            compared = [f[case.skip :] for f, case in zip(forecasts[name], cases, strict=True)]
            about = dict(
                protocol=protocol, split=split, context=context, precision=codec.precision, seed=None, scale=codec.scale
            )
            spent = dict(flops=0, seconds=0.0, model=name, run=None, data_sha256=dataset.sha256)
            results.append(Result(**about, **spent, **score(cases, compared)))
    return results
