"""Evaluation protocols: what is forecast, what it is compared with, and how sure the figures are.

P5
    For each context length S, windows of S tokens start every 256 tokens of each series' text, even inside a number.
    Decoding goes on until the 6th ``;``; the five steps between the 1st and the 6th are compared with the truth.
L50, L20
    50 steps in and 50 out; 80 in and 20 out, whole steps.

Errors are in the units of the series. Forecasts that do not parse are counted and shown, never filled in.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from .baselines import BASELINES, run_baselines
from .data import Dataset
from .files import UserError
from .forecasting import generate
from .models import Base
from .settings import LoraSettings
from .text import Codec

P5_STRIDE = 256
P5_STEPS = 5
P5_CONTEXTS = (128, 512, 768)
HORIZONS = {"L50": (50, 50), "L20": (80, 20)}
PROTOCOLS = ("P5", *HORIZONS)


@dataclass(frozen=True)
class Case:
    """One forecast to be made and the truth it is compared with."""

    series: int
    """Index in its split."""
    start: int
    """Token of the series at which the context begins."""
    context: str
    """Encoded text the model sees."""
    truth: np.ndarray
    """(steps compared, variables), in the units of the series."""
    skip: int
    """Separators the model writes before the compared steps begin: 1 in P5, where a context can end inside a step."""


@dataclass(frozen=True)
class Result:
    """One row of a table: one model, one protocol, one context length."""

    protocol: str
    split: str
    context: int
    """Tokens in P5, steps in L50 and L20."""
    precision: int
    seed: int | None
    scale: float
    mse: float | None
    """Mean over valid windows, steps and variables; None when no forecast was valid."""
    rmse: float | None
    mae: float | None
    mae_per_variable: list[float] | None
    per_step_mae: list[float] | None
    n: int
    """Windows."""
    n_valid: int
    """Windows whose forecast parsed whole."""
    ci_mae: list[float] | None
    """Bootstrap 95 % interval of `mae`, low and high, series resampled whole."""
    flops: int
    seconds: float
    model: str
    run: str | None
    data_sha256: str
    window_mae: list[float | None] = field(default_factory=list)
    """Error of each window, None where invalid: for comparisons on the windows that two models both got valid."""
    series: list[int] = field(default_factory=list)
    """Which series each window is from."""
    base_sha256: str | None = None
    """Of the base's weights; None for a baseline."""
    constrained: bool = False
    """Whether only what the grammar allows was written."""


def make_cases(trajectories: np.ndarray, codec: Codec, protocol: str, context: int | None = None) -> list[Case]:
    """The forecasts a protocol asks for.

    Parameters
    ----------
    trajectories : (n_series, n_steps, n_variables)
    protocol : {"P5", "L50", "L20"}
    context : int, optional
        Tokens of context; P5 only.

    Raises
    ------
    UserError
        If the protocol is unknown, the series are too short for it, or the context is.
    """
    if protocol == "P5":
        cases = [case for i, values in enumerate(trajectories) for case in _p5_cases(i, values, codec, context)]
    elif protocol in HORIZONS:
        known, ahead = HORIZONS[protocol]
        cases = [
            Case(i, 0, codec.encode(v[:known]), v[known : known + ahead].astype(float), 0)
            for i, v in enumerate(trajectories)
        ]
        cases = [case for case in cases if len(case.truth) == ahead]
    else:
        raise UserError(f"protocol {protocol!r}: choose from {', '.join(PROTOCOLS)}")
    if not cases:
        raise UserError(
            f"protocol {protocol}: series of {trajectories.shape[1]} steps are too short for context {context}; "
            "use longer ones, or P5 with a shorter context"
        )
    if any(case.context.count(codec.step_separator) <= min(case.start, 1) for case in cases):
        raise UserError(f"protocol {protocol}: a window of {context} tokens holds no whole step; use a longer context")
    return cases


def _p5_cases(index: int, values: np.ndarray, codec: Codec, context: int) -> list[Case]:
    text, n_variables = codec.encode(values), values.shape[1]
    steps = P5_STEPS + 1
    cases = []
    for start in range(0, len(text) - context, P5_STRIDE):
        rest = text[start + context :]
        if len(rest) < steps * codec.shortest_step(n_variables) or rest.count(codec.step_separator) < steps:
            break
        cases.append(
            Case(index, start, text[start : start + context], _compared(codec, rest, 1, n_variables)[:P5_STEPS], 1)
        )
    return cases


def _compared(codec: Codec, text: str, skip: int, n_variables: int) -> np.ndarray:
    """Values of the whole steps after the first `skip` separators of a text, (steps, variables)."""
    for _ in range(skip):
        text = text.partition(codec.step_separator)[2]
    return codec.decode(text, n_variables).values


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
    """
    trajectories = dataset.part(split)[:limit]
    results, how = [], dict(batch_size=batch_size, lora=lora, constrained=constrained)
    lengths = contexts if protocol == "P5" else [HORIZONS.get(protocol, (0,))[0]]
    cases_of = {n: make_cases(trajectories, codec, protocol, n) for n in lengths}  # refused before anything is spent
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
                forecasts.append(_compared(codec, out.text, case.skip, n_variables))
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
        known = [_numeric_context(codec, case, trajectories.shape[2]) for case in cases]
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


def _numeric_context(codec: Codec, case: Case, n_variables: int) -> np.ndarray:
    """The whole steps of a context, (steps, variables): one that begins inside a series may begin inside a number."""
    return _compared(codec, case.context, min(case.start, 1), n_variables)


def score(cases: Sequence[Case], forecasts: Sequence[np.ndarray]) -> dict:
    """Errors of forecasts, by window, by variable and by step ahead, over the valid ones.

    Parameters
    ----------
    forecasts : sequence of (steps that parsed, variables)
        A forecast with fewer steps than its truth is invalid.

    Returns
    -------
    dict
        The fields of `Result` that are measured.
    """
    errors = [
        f[: len(c.truth)] - c.truth if len(f) >= len(c.truth) else None for c, f in zip(cases, forecasts, strict=True)
    ]
    valid = [e for e in errors if e is not None]
    series = [c.series for c in cases]
    window_mae = [None if e is None else float(f"{np.abs(e).mean():.6g}") for e in errors]
    measured = dict(n=len(cases), n_valid=len(valid), window_mae=window_mae, series=series)
    if not valid:
        return measured | dict.fromkeys(("mse", "rmse", "mae", "mae_per_variable", "per_step_mae", "ci_mae"))
    e = np.stack(valid)  # (valid windows, steps, variables)
    mse = float((e**2).mean())
    return measured | {
        "mse": mse,
        "rmse": mse**0.5,
        "mae": float(np.abs(e).mean()),
        "mae_per_variable": np.abs(e).mean(axis=(0, 1)).tolist(),
        "per_step_mae": np.abs(e).mean(axis=(0, 2)).tolist(),
        "ci_mae": list(bootstrap(window_mae, series)),
    }


def bootstrap(
    window_values: Sequence[float | None],
    series: Sequence[int],
    against: Sequence[float] | None = None,
    n_resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """95 % interval of a mean over windows, by resampling whole series: windows of one series are not independent.

    With `against`, other values of the same windows, it is the interval of the ratio of the two means.

    Source: Efron and Tibshirani, "An Introduction to the Bootstrap", 1993; percentile interval, clustered by series.
    """
    sums: dict[int, list[float]] = {}
    beneath = [1.0] * len(series) if against is None else against
    for value, index, other in zip(window_values, series, beneath, strict=True):
        if value is not None:
            total = sums.setdefault(index, [0.0, 0.0])
            total[0] += value
            total[1] += other
    table = np.array(list(sums.values()))  # (series, 2): sum of the values, and their number or sum of the others
    picks = np.random.default_rng(seed).integers(0, len(table), (n_resamples, len(table)))
    totals = table[picks].sum(axis=1)  # (resamples, 2)
    low, high = np.percentile(totals[:, 0] / totals[:, 1], [2.5, 97.5])
    return float(low), float(high)


def paired_change(result: Result, reference: Result) -> tuple[float, float, float]:
    """Change of the mean error against a reference in per cent, with its 95 % interval, on windows both got valid.

    Raises
    ------
    UserError
        If the two were not measured on the same windows, or have no valid one in common.
    """
    same = ("protocol", "split", "context", "series", "data_sha256")
    if any(getattr(result, name) != getattr(reference, name) for name in same):
        raise UserError(
            f"{result.model} and {reference.model} were measured on different windows: evaluate both on the same data, split and protocol"
        )
    rows = [
        (a, b, s)
        for a, b, s in zip(result.window_mae, reference.window_mae, result.series, strict=True)
        if a is not None and b is not None
    ]
    if not rows:
        raise UserError(f"{result.model} and {reference.model}: no window where both gave a valid forecast to compare")
    ours, theirs, series = zip(*rows, strict=True)
    return tuple(100 * (ratio - 1) for ratio in (sum(ours) / sum(theirs), *bootstrap(ours, series, theirs)))


def origins(rows: Sequence[dict]) -> set[tuple[str, str]]:
    """The hashes of data and base that recorded rows were measured with."""
    return {(row["data_sha256"], row["base_sha256"]) for row in rows}


def to_json(results: Sequence[Result]) -> list[dict]:
    """Results as the JSON that ``evaluate --json`` and ``metrics.json`` hold."""
    return [asdict(result) for result in results]


def from_json(rows: Sequence[dict]) -> list[Result]:
    """The results in a ``metrics.json``."""
    return [Result(**row) for row in rows]
