"""Scores: the errors of forecasts, how sure they are, and how two models compare. No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import NamedTuple

import numpy as np

from ..files import UserError
from .protocols import Case

_SAME = 2e-5  # relative difference under which two errors of a window, kept to six digits, are one


@dataclass(frozen=True)
class Errors:
    """A second set of errors of the same windows: of other forecasts, or against another truth."""

    mse: float | None
    rmse: float | None
    mae: float | None
    mae_per_variable: list[float] | None
    per_step_mae: list[float] | None
    ci_mae: list[float] | None
    window_mae: list[float | None]


@dataclass(frozen=True)
class DistributionScores:
    """What forecasts are worth that are distributions, against the series as stored, over the windows that have one at every step.

    Intervals are those of `bootstrap`, low and high.
    """

    samples: int
    """Paths drawn for each window."""
    n: int
    n_valid: int
    crps: float
    """Continuous ranked probability score, mean over windows, steps and variables, in the units of the series."""
    ci_crps: list[float]
    crps_per_step: list[float]
    wql: float
    """Weighted quantile loss: twice the pinball losses at the nine deciles, over the sum of the truth's absolute values."""
    ci_wql: list[float]
    coverage_80: float
    """The share of the truth between the 10 % and 90 % quantiles."""
    ci_coverage_80: list[float]
    coverage_80_per_step: list[float]
    width_80: float
    """Mean distance of those quantiles, in the units of the series."""
    width_80_per_step: list[float]
    mae_median: float
    """Mean absolute error of the medians."""
    ci_mae_median: list[float]
    mase_median: float | None
    """The same, each window's error over the mean step of its context; None where no context moves."""
    pit: list[float]
    """Shares of the truth as text in ten equal parts of the probability integral transform; 0.1 each where the distributions are right."""
    window_crps: list[float | None]
    series: list[int]
    spread: list[float] | None = None
    """By step ahead, how far the distributions were stretched about their medians; None where they are as drawn."""


@dataclass(frozen=True)
class Result:
    """One row of a table: one model, one protocol, one context length.

    In P5 the errors stand on equal terms: truth and forecast both rounded as text is. Fields that are None are left out of records.
    """

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
    against_stored: Errors | None = None
    """P5: against the series as stored, not as text; a model's forecast as it wrote it, a baseline's as it was computed."""
    as_computed: Errors | None = None
    """P5, baselines: of the forecast as it was computed, not rounded like the truth that it is compared with."""
    distribution: DistributionScores | None = None
    """Of sampled forecasts, as they were drawn."""
    calibrated: DistributionScores | None = None
    """Of the same, stretched as validation series asked for (`spread.spread_factors`)."""
    machine: str | None = None
    """What it was measured on."""


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

    @property
    def errors(self) -> Errors:
        """The errors alone, for a second set."""
        return Errors(**{f.name: getattr(self, f.name) for f in fields(Errors)})


def score(cases: Sequence[Case], forecasts: Sequence[np.ndarray], *, stored: bool = False) -> Scores:
    """Errors of forecasts, by window, by variable and by step ahead, over the valid ones.

    Parameters
    ----------
    forecasts : sequence of (steps that parsed, variables)
        A forecast with fewer steps than its truth is invalid.
    stored : bool
        Compare with the series as stored, where the truth is text.
    """
    truths = [c.stored if stored else c.truth for c in cases]
    errors = [f[: len(t)] - t if len(f) >= len(t) else None for t, f in zip(truths, forecasts, strict=True)]
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
    rows = _both_valid(result, reference)
    ours, theirs, series = zip(*rows, strict=True)
    low, high = bootstrap(ours, series, theirs)
    return 100 * (sum(ours) / sum(theirs) - 1), 100 * (low - 1), 100 * (high - 1)


class Duel(NamedTuple):
    """On how many windows a forecaster is better than another, as good, and worse."""

    wins: int
    ties: int
    losses: int


def duel(result: Result, reference: Result) -> Duel:
    """Count the windows that a result wins, ties and loses against a reference, of those both got valid.

    On equal terms ties are real: both forecasts are on the text's grid. Errors are those of `paired_change`, as are its refusals.
    """
    pairs = [(a, b) for a, b, _ in _both_valid(result, reference)]
    tied = [math.isclose(a, b, rel_tol=_SAME, abs_tol=1e-12) for a, b in pairs]
    wins = sum(a < b and not same for (a, b), same in zip(pairs, tied, strict=True))
    return Duel(wins, sum(tied), len(pairs) - wins - sum(tied))


def _both_valid(result: Result, reference: Result) -> list[tuple[float, float, int]]:
    """Of each window that two results both got valid: the one's error, the other's, and the series."""
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
    return rows


def origins(rows: Sequence[dict]) -> set[tuple[str, str]]:
    """The hashes of data and base that recorded rows were measured with."""
    return {(row["data_sha256"], row["base_sha256"]) for row in rows}


_PARTS: dict[str, type] = {
    "against_stored": Errors,
    "as_computed": Errors,
    "distribution": DistributionScores,
    "calibrated": DistributionScores,
}
LATER = (*_PARTS, "machine")
"""Fields of a `Result` that older records do not have."""


def to_json(results: Sequence[Result]) -> list[dict]:
    """Results as the JSON that ``evaluate --json`` and ``metrics.json`` hold."""
    return [{k: v for k, v in asdict(r).items() if v is not None or k not in LATER} for r in results]


def from_json(rows: Sequence[dict]) -> list[Result]:
    """The results in a ``metrics.json``."""
    return [Result(**row | {k: _PARTS[k](**v) for k, v in row.items() if v and k in _PARTS}) for row in rows]
