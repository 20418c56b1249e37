"""Measuring a model, and the baselines, under a protocol."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NotRequired, TypedDict

import numpy as np
from tqdm.auto import tqdm

from ..data import Dataset
from ..files import UserError
from ..forecasting import generate
from ..ledger import Ledger, default_ledger
from ..models import Base
from ..settings import LoraSettings
from ..text import Codec
from .baselines import BASELINES, run_baselines
from .predictive import SAMPLES, draw
from .protocols import HORIZONS, P5_CONTEXTS, Case, compared, make_cases, numeric_context
from .scores import Result, score
from .spread import score_distributions, spread_factors

_CALIBRATED_ON = "validation"  # never the test split


class Calibration(TypedDict):
    """What ``calibration.json`` holds, beside a run."""

    spread: dict[str, list[float]]
    """Context → factor by step ahead; on a normal distribution, a temperature of its square."""
    split: str
    windows: list[int]
    """By context."""
    samples: int
    constrained: bool
    flops: int
    data_sha256: str
    base_sha256: str
    machine: NotRequired[str]


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
    samples: int = 0,
    spread: Mapping[int, Sequence[float]] | None = None,
    ledger: Ledger | None = None,
) -> list[Result]:
    """Run a protocol over a split: one result for each context length.

    What is measured, how, what is recorded with it, and who pays are all arguments, so they are many.

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
    samples : int
        Paths to draw of each window, for the scores of distributions; none by default.
    spread : mapping, optional
        Context → factor by step ahead, of `calibrate`: the distributions stretched by them are scored as well.
    ledger : Ledger, optional
        Where it is charged; by default the base's own (`default_ledger`).
    """
    todo = _windows(dataset, codec, protocol, split, contexts, limit)  # refused before anything is spent
    ledger = ledger or default_ledger(base)  # opened once, not for every batch
    results = []
    for windows in todo:
        cases, about = windows.cases, f"{protocol} {windows.context}"
        started, forecasts, flops = time.perf_counter(), list[np.ndarray](), 0
        for first in tqdm(range(0, len(cases), batch_size), desc=about, unit="batch", leave=False):
            batch = cases[first : first + batch_size]
            written = generate(
                base, codec, [c.context for c in batch], batch[0].steps, windows.n_variables,
                batch_size=batch_size, lora=lora, constrained=constrained, ledger=ledger,
            )  # fmt: skip
            for case, out in zip(batch, written, strict=True):
                forecasts.append(compared(codec, out.text, case.skip, windows.n_variables))
                flops += out.flops
        seconds = round(time.perf_counter() - started, 2)
        who = _Forecaster(base.name, run, seed, base.sha256, constrained)
        result = windows.result(forecasts, who, flops, seconds)
        if samples:
            drawn = draw(base, codec, cases, samples, lora=lora, constrained=constrained, ledger=ledger)
            scored = partial(score_distributions, cases, drawn.distributions, codec, samples)
            factors = (spread or {}).get(windows.context)
            seconds = round(time.perf_counter() - started, 2)
            result = replace(
                result, distribution=scored(), calibrated=scored(factors) if factors else None,
                flops=flops + drawn.flops, seconds=seconds,
            )  # fmt: skip
        results.append(result)
    return results


def calibrate(
    base: Base,
    codec: Codec,
    dataset: Dataset,
    *,
    contexts: Sequence[int] = P5_CONTEXTS,
    limit: int | None = None,
    samples: int = SAMPLES,
    lora: LoraSettings | None = None,
    constrained: bool = False,
    ledger: Ledger | None = None,
) -> Calibration:
    """How far distributions must be stretched for their 80 % bands to cover 80 %, by context and step ahead: fitted on validation, in P5.

    Parameters and what is charged are as in `evaluate`.

    Raises
    ------
    UserError
        If at some step no path of any window parses.
    """
    ledger = ledger or default_ledger(base)
    found: dict[str, list[float]] = {}
    windows, flops = [], 0
    for some in _windows(dataset, codec, "P5", _CALIBRATED_ON, contexts, limit):
        drawn = draw(base, codec, some.cases, samples, lora=lora, constrained=constrained, ledger=ledger)
        factors = spread_factors(some.cases, drawn.distributions)
        if not np.all(np.isfinite(factors)):
            raise UserError(
                f"{base.short_name}: no sampled forecast of some step parses, so none can be calibrated; add --constrained"
            )
        found[str(some.context)] = factors
        windows.append(len(some.cases))
        flops += drawn.flops
    return Calibration(
        spread=found, split=_CALIBRATED_ON, windows=windows, samples=samples, constrained=constrained, flops=flops,
        data_sha256=dataset.sha256, base_sha256=base.sha256,
    )  # fmt: skip


def evaluate_baselines(
    dataset: Dataset,
    codec: Codec,
    protocol: str,
    *,
    split: str = "test",
    contexts: Sequence[int] = P5_CONTEXTS,
    cache: Path,
) -> list[Result]:
    """`BASELINES` on the same windows.

    They see the whole steps of each context as numbers, read from its text. Where the truth is text (P5) their forecasts are
    rounded as a model's are, and the errors of the forecast as computed stand beside those. Forecasts are cached under the data's hash.
    """
    dt = float(dataset.time[1] - dataset.time[0])
    results = []
    for windows in _windows(dataset, codec, protocol, split, contexts):
        known = [numeric_context(codec, case, windows.n_variables) for case in windows.cases]
        steps = [case.steps for case in windows.cases]
        decimals = "" if codec.precision == 2 else f"-p{codec.precision}"  # other texts hold other contexts
        key = f"{protocol}-{split}-{windows.context}{decimals}-{dataset.sha256[:16]}"
        forecasts = run_baselines(list(zip(known, steps, strict=True)), dt, cache, key, progress=True)
        for name in BASELINES:
            kept = [f[case.skip :] for f, case in zip(forecasts[name], windows.cases, strict=True)]
            results.append(windows.result(kept, _Forecaster(name), computed=True))
    return results


def rounding_cost(dataset: Dataset, codec: Codec, split: str = "test") -> list[Result]:
    """What text alone costs in P5: the exact future, written as text, against the series as stored (`Result.against_stored`)."""
    return [
        windows.result([case.truth for case in windows.cases], _Forecaster("the future itself, as text"))
        for windows in _windows(dataset, codec, "P5", split, P5_CONTEXTS)
    ]


@dataclass(frozen=True)
class _Forecaster:
    """Whose forecasts they are, as a `Result` names it."""

    model: str
    run: str | None = None
    seed: int | None = None
    base_sha256: str | None = None
    constrained: bool = False


@dataclass(frozen=True)
class _Windows:
    """The windows of a split that a protocol asks for, of one length of context."""

    dataset: Dataset
    codec: Codec
    protocol: str
    split: str
    context: int
    cases: list[Case]

    @property
    def n_variables(self) -> int:
        return self.cases[0].truth.shape[1]

    def result(
        self,
        forecasts: Sequence[np.ndarray],
        by: _Forecaster,
        flops: int = 0,
        seconds: float = 0.0,
        computed: bool = False,
    ) -> Result:
        """What forecasts of these windows are worth; `computed` ones are numbers, and not read from text."""
        text = any(case.unrounded is not None for case in self.cases)  # the truth is
        scores = score(self.cases, [self.codec.rounded(f) for f in forecasts] if text and computed else forecasts)
        return Result(
            protocol=self.protocol,
            split=self.split,
            context=self.context,
            precision=self.codec.precision,
            seed=by.seed,
            scale=self.codec.scale,
            mse=scores.mse,
            rmse=scores.rmse,
            mae=scores.mae,
            mae_per_variable=scores.mae_per_variable,
            per_step_mae=scores.per_step_mae,
            n=scores.n,
            n_valid=scores.n_valid,
            ci_mae=scores.ci_mae,
            flops=flops,
            seconds=seconds,
            model=by.model,
            run=by.run,
            data_sha256=self.dataset.sha256,
            window_mae=scores.window_mae,
            series=scores.series,
            base_sha256=by.base_sha256,
            constrained=by.constrained,
            against_stored=score(self.cases, forecasts, stored=True).errors if text else None,
            as_computed=score(self.cases, forecasts).errors if text and computed else None,
        )


def _windows(
    dataset: Dataset, codec: Codec, protocol: str, split: str, contexts: Sequence[int], limit: int | None = None
) -> list[_Windows]:
    """One for each length of context: those asked for in P5, the protocol's own in any other."""
    trajectories = dataset.part(split)[:limit]
    lengths = contexts if protocol == "P5" else [HORIZONS.get(protocol, (0,))[0]]
    return [
        _Windows(dataset, codec, protocol, split, n, make_cases(trajectories, codec, protocol, n))
        for n in dict.fromkeys(lengths)
    ]
