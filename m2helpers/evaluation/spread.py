"""Forecasts that are distributions: what they are worth against the series as stored, and how wide they ought to be. No torch.

Temperature is fitted after the fact: a distribution is stretched about its median by a factor for each step ahead, which on a normal
distribution is what a temperature of the factor squared would do. The factors come from validation series, never from the test split.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ..forecasting.distribution import Distribution
from ..text import Codec
from .protocols import Case, numeric_context
from .scores import DistributionScores, bootstrap

LEVELS = np.arange(1, 10) / 10
_BAND = (0.1, 0.9)
_BINS = 10  # of the PIT histogram


def stretched(distribution: Distribution, factors: Sequence[float]) -> Distribution:
    """A distribution spread out about its medians, each step by its own factor; medians stay where they are."""
    factor, middle = np.asarray(factors, dtype=float)[:, None], distribution.median  # (steps, 1), (steps, variables)
    level = middle + factor * (distribution.level - middle)
    return replace(distribution, width=factor * distribution.width, level=level)


def spread_factors(cases: Sequence[Case], distributions: Sequence[Distribution], share: float = 0.8) -> list[float]:
    """By step ahead, the least factor with which the 80 % bands of `stretched` distributions cover `share` of the truth.

    A band reaches a truth at the factor that the truth's distance from the median is of the band's; the factor sought is a quantile
    of those. With series it has not seen, such a band covers `share` of as many, up to chance (split conformal prediction). NaN if some step is
    known of no window.

    Source: Romano, Patterson and Candès, "Conformalized quantile regression", 2019; here scaled about the median.
    """
    truth = np.stack([case.stored for case in cases])  # (windows, steps, variables)
    low, middle, high = (
        np.stack([d.quantile(level)[0] for d in distributions]) for level in (_BAND[0], 0.5, _BAND[1])
    )  # each (windows, steps, variables)
    side = np.where(truth >= middle, high - middle, middle - low)
    needed = np.abs(truth - middle) / side  # (windows, steps, variables); NaN where nothing is known
    if np.isnan(needed).all(axis=(0, 2)).any():
        return [math.nan] * needed.shape[1]
    return [float(np.nanquantile(needed[:, step], share)) for step in range(needed.shape[1])]


def score_distributions(
    cases: Sequence[Case],
    distributions: Sequence[Distribution],
    codec: Codec,
    samples: int,
    factors: Sequence[float] | None = None,
) -> DistributionScores | None:
    """What the distributions of some windows are worth; None if none has every step.

    Parameters
    ----------
    distributions : sequence of Distribution
        One a window, of the steps that are compared.
    samples : int
        Recorded.
    factors : sequence of float, optional
        Stretch them first.
    """
    known = [bool(d.mass.any(-1).all()) for d in distributions]
    if not any(known):
        return None
    kept = [
        (c, stretched(d, factors) if factors else d) for c, d, k in zip(cases, distributions, known, strict=True) if k
    ]
    series = [case.series for case, _ in kept]
    truth = np.stack([case.stored for case, _ in kept])  # (windows, steps, variables)
    quantiles = np.stack([d.quantile(LEVELS) for _, d in kept], axis=1)  # (levels, windows, steps, variables)
    low, median, high = quantiles[0], quantiles[len(LEVELS) // 2], quantiles[-1]
    covered = ((low <= truth) & (truth <= high)).astype(float)
    crps = np.stack([d.crps(case.stored) for case, d in kept])  # (windows, steps, variables)
    off = truth - quantiles
    pinball = 2 * np.where(off >= 0, LEVELS[:, None, None, None] * off, (LEVELS[:, None, None, None] - 1) * off)
    lost, size = pinball.mean(axis=0).sum(axis=(1, 2)), np.abs(truth).sum(axis=(1, 2))  # (windows,)
    window_crps = iter(crps.mean(axis=(1, 2)))
    errors = np.abs(median - truth)
    return DistributionScores(
        samples=samples,
        n=len(cases),
        n_valid=len(kept),
        crps=float(crps.mean()),
        ci_crps=_interval(crps, series),
        crps_per_step=crps.mean(axis=(0, 2)).tolist(),
        wql=float(lost.sum() / size.sum()),
        ci_wql=list(bootstrap(lost.tolist(), series, size.tolist())),
        coverage_80=float(covered.mean()),
        ci_coverage_80=_interval(covered, series),
        coverage_80_per_step=covered.mean(axis=(0, 2)).tolist(),
        width_80=float((high - low).mean()),
        width_80_per_step=(high - low).mean(axis=(0, 2)).tolist(),
        mae_median=float(errors.mean()),
        ci_mae_median=_interval(errors, series),
        mase_median=_scaled([case for case, _ in kept], errors, codec),
        pit=_pit(kept, codec),
        window_crps=[float(f"{next(window_crps):.6g}") if k else None for k in known],
        series=[case.series for case in cases],
        spread=None if factors is None else list(factors),
    )


def _interval(values: np.ndarray, series: Sequence[int]) -> list[float]:
    return list(bootstrap(values.mean(axis=(1, 2)).tolist(), series))


def _scaled(cases: Sequence[Case], errors: np.ndarray, codec: Codec) -> float | None:
    """Mean absolute scaled error (Hyndman and Koehler, 2006): each variable's error over the mean step of its context."""
    ratios = []
    for case, error in zip(cases, errors, strict=True):  # (steps, variables)
        steps = np.abs(np.diff(numeric_context(codec, case, error.shape[1]), axis=0))
        unit = steps.mean(axis=0) if len(steps) else np.zeros(error.shape[1])
        ratios.append(error[:, unit > 0] / unit[unit > 0])
    flat = np.concatenate([ratio.ravel() for ratio in ratios])
    return float(flat.mean()) if flat.size else None


def _pit(kept: Sequence[tuple[Case, Distribution]], codec: Codec) -> list[float]:
    """Histogram of the PIT of discrete values: each spreads one unit evenly from the mass below its cell to that below its end.

    Source: Czado, Gneiting and Held, "Predictive model assessment for count data", 2009, eq. 2.
    """
    written = [codec.rounded(case.stored) for case, _ in kept]
    half = 0.5 * codec.resolution
    below = np.stack([d.cdf(w - half) for w, (_, d) in zip(written, kept, strict=True)]).reshape(-1, 1)  # (values, 1)
    above = np.stack([d.cdf(w + half) for w, (_, d) in zip(written, kept, strict=True)]).reshape(-1, 1)
    edges, wide = np.linspace(0, 1, _BINS + 1), above - below
    inside = np.clip((edges - below) / np.where(wide > 0, wide, 1), 0, 1)  # (values, edges)
    up_to = np.where(wide > 0, inside, edges > below)  # a value where there is no mass is a point
    up_to[:, -1] = 1
    return np.diff(up_to, axis=1).mean(axis=0).tolist()
