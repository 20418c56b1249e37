"""Scores: the errors of forecasts, how sure they are, and how two models compare. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import numpy as np

from ..files import UserError
from .protocols import Case


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


@dataclass(frozen=True)
class Scores:
    """What of a `Result` is measured by comparing forecasts with the truth."""

    n: int
    n_valid: int
    window_mae: list[float | None]
    series: list[int]
    mse: float | None = None
    rmse: float | None = None
    mae: float | None = None
    mae_per_variable: list[float] | None = None
    per_step_mae: list[float] | None = None
    ci_mae: list[float] | None = None


def score(cases: Sequence[Case], forecasts: Sequence[np.ndarray]) -> Scores:
    """Errors of forecasts, by window, by variable and by step ahead, over the valid ones.

    Parameters
    ----------
    forecasts : sequence of (steps that parsed, variables)
        A forecast with fewer steps than its truth is invalid.
    """
    errors = [
        f[: len(c.truth)] - c.truth if len(f) >= len(c.truth) else None for c, f in zip(cases, forecasts, strict=True)
    ]
    valid = [e for e in errors if e is not None]
    series = [c.series for c in cases]
    window_mae = [None if e is None else float(f"{np.abs(e).mean():.6g}") for e in errors]
    if not valid:
        return Scores(len(cases), 0, window_mae, series)
    e = np.stack(valid)  # (valid windows, steps, variables)
    mse = float((e**2).mean())
    return Scores(
        n=len(cases),
        n_valid=len(valid),
        window_mae=window_mae,
        series=series,
        mse=mse,
        rmse=mse**0.5,
        mae=float(np.abs(e).mean()),
        mae_per_variable=np.abs(e).mean(axis=(0, 1)).tolist(),
        per_step_mae=np.abs(e).mean(axis=(0, 2)).tolist(),
        ci_mae=list(bootstrap(window_mae, series)),
    )


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
    low, high = bootstrap(ours, series, theirs)
    return 100 * (sum(ours) / sum(theirs) - 1), 100 * (low - 1), 100 * (high - 1)


def origins(rows: Sequence[dict]) -> set[tuple[str, str]]:
    """The hashes of data and base that recorded rows were measured with."""
    return {(row["data_sha256"], row["base_sha256"]) for row in rows}


def to_json(results: Sequence[Result]) -> list[dict]:
    """Results as the JSON that ``evaluate --json`` and ``metrics.json`` hold."""
    return [asdict(result) for result in results]


def from_json(rows: Sequence[dict]) -> list[Result]:
    """The results in a ``metrics.json``."""
    return [Result(**row) for row in rows]
