"""Forecasting baselines for two-variable population series: last value, last season, parroting, vector autoregression, ODE fit.

They say what a forecast is worth. *Last value*, *seasonal naive* and *context parroting* cost nothing, *vector autoregression* is
the usual statistical model, and the *ODE fit* knows the equations of the data, which no other forecaster here is told.
Every baseline is a function ``(context, steps, dt) -> forecast`` in population units; nothing here needs torch.
"""

from __future__ import annotations

import hashlib
import warnings
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from scipy.optimize import OptimizeResult, least_squares
from tqdm.auto import tqdm

from ..files import UserError, atomic_path
from ..paths import SHIPPED_BASELINES
from ..simulator import integrate
from .naive import parrot, seasonal_naive

# Populations come from text with two decimals, so they are known to about ±0.004; less than this may be "0.00", which
# has no logarithm.
_FLOOR = 0.004

# Vector autoregression: the largest lag tried, and how far outside the context's range a forecast may go (in logs).
_MAX_LAG = 6
_LOG_MARGIN = np.log(2.0)

# ODE fit: prior of (r, K, a, h, e, d), normal in logs; one standard deviation is half of these ranges. The data's h
# starts at 0, which has no logarithm, so 0.03 stands in for it.
_RANGES = np.array([(0.11, 0.30), (5.0, 16.0), (0.21, 0.49), (0.03, 0.18), (0.30, 0.70), (0.10, 0.30)])
_PRIOR_MEAN = np.log(_RANGES).mean(axis=1)
_PRIOR_SD = np.diff(np.log(_RANGES), axis=1)[:, 0] / 2
_NOISE = 0.003  # standard deviation of an observation, population units: rounding makes 0.0024
_STARTS_H = (0.02, 0.07, 0.15)  # values of h that integral matching starts from
_STARTS_KEPT = 3
_RELATIVE_TOLERANCE = 1e-4  # of the sum of squares: 1e-7 gave the same errors to four decimals on simulated systems
_HUGE = 1e9  # stands for a residual that overflowed
_DIFFERENCE = 1e-5  # finite-difference step, in standard deviations

# Part of the cache's fingerprint: raise it whenever a baseline's numbers change. A baseline that is new needs no higher one.
_VERSION = 2


def last_value(context: np.ndarray, steps: int, dt: float) -> np.ndarray:
    """Repeat the last observation.

    Parameters
    ----------
    context : array (n, v)
        Observed populations, oldest first.
    steps : int
        Steps to forecast.
    dt : float
        Time between two steps (unused here; every baseline has the same signature).

    Returns
    -------
    array (steps, v), float64
    """
    context = _checked(context, steps)
    return np.repeat(context[-1:], steps, axis=0)


def vector_autoregression(context: np.ndarray, steps: int, dt: float) -> np.ndarray:
    """Forecast with a vector autoregression (constant and lags, least squares) on log-populations.

    Populations are raised to 0.004 (half a rounding unit) before the logarithm. Of the lags 1…6 that the context is
    long enough for, the one with the smallest corrected Akaike criterion (Hurvich and Tsai, 1993) is used. A forecast
    is held within a factor of two of the context's own range, since an unstable fit would otherwise explode.
    With fewer than 5 steps (of two variables), or a constant variable, the forecast is the last value.

    Parameters and result, context (n, v) to forecast (steps, v), are those of `last_value`.
    """
    # Slow to import (over a second), and only this function needs it.
    from statsmodels.tsa.api import VAR

    context = _checked(context, steps)
    logs = np.log(np.maximum(context, _FLOOR))
    n, v = logs.shape
    best, best_score = None, np.inf
    for lag in range(1, _MAX_LAG + 1):
        rows, columns = n - lag, v * lag + 1
        spare = rows - columns - v - 1
        if rows <= columns or (lag > 1 and spare < 1) or np.any(np.ptp(logs, axis=0) == 0):
            break
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            try:
                fitted = VAR(logs).fit(maxlags=lag, trend="c")
                forecast = fitted.forecast(logs[-lag:], steps)
                log_determinant = np.linalg.slogdet(fitted.resid.T @ fitted.resid / rows)[1]
            except (np.linalg.LinAlgError, ValueError):
                continue
        # Per row, because lags differ in how many rows they leave.
        score = log_determinant + 2 * (columns * v + v * (v + 1) / 2) / max(spare, 1)
        if score < best_score and np.all(np.isfinite(forecast)):
            best, best_score = forecast, score
    if best is None:
        return last_value(context, steps, dt)
    return np.exp(np.clip(best, logs.min(axis=0) - _LOG_MARGIN, logs.max(axis=0) + _LOG_MARGIN))


def ode_fit(context: np.ndarray, steps: int, dt: float) -> np.ndarray:
    """Fit the data's own equations to the context and integrate on.

    Least squares (``scipy.optimize.least_squares``) on the logarithms of r, K, a, h, e, d and of the initial state;
    residuals are in population units, since rounding errs by the same amount everywhere. A weak log-normal prior
    decides what a short context leaves open: its centre is the middle of the ranges seen in the data (r 0.11–0.30,
    K 5–16, a 0.21–0.49, h 0.03–0.18, e 0.30–0.70, d 0.10–0.30), one standard deviation is half a range, and a parameter
    one standard deviation away weighs as much as one residual of 0.003. Starting points are the prior's centre and, for
    three values of h, the linear least-squares solution of the equations integrated from step to step (integral
    matching); the best of them are refined in turn until one fits within the noise, three at most.

    Parameters and result, context (n, 2) to forecast (steps, 2), are those of `last_value`; `dt` is in the time unit
    of the rates.

    Raises
    ------
    UserError
        If the context does not have exactly two variables.
    """
    context = _checked(context, steps)
    if context.shape[1] != 2:
        raise UserError(f"the ODE fit needs two variables (prey, predator), not {context.shape[1]}; give it those two")
    n = len(context)
    first = np.log(np.maximum(context[0], _FLOOR))
    centre = np.concatenate([_PRIOR_MEAN, first])
    # Unknowns are measured in standard deviations; the initial state has no prior, only a unit of the right size.
    unit = np.concatenate([_PRIOR_SD, _NOISE / np.exp(first)])

    def trajectories(z: np.ndarray, length: int) -> np.ndarray:  # (8, m) -> (length, 2, m)
        values = np.exp(centre[:, None] + np.clip(unit[:, None] * z, -20, 20))
        return integrate(values[:6], values[6:], length, dt)

    def residuals(z: np.ndarray) -> np.ndarray:  # (8, m) -> (2n + 6, m)
        errors = (trajectories(z, n) - context[:, :, None]) / _NOISE
        rows = np.concatenate([errors.reshape(2 * n, -1), z[:6]])
        return np.clip(np.nan_to_num(rows, nan=_HUGE), -_HUGE, _HUGE)

    starts = np.zeros((8, 1 + len(_STARTS_H)))  # the first is the prior's centre
    for column, h in enumerate(_STARTS_H, start=1):
        starts[:6, column] = (np.log(_integral_matching(context, dt, h)) - _PRIOR_MEAN) / _PRIOR_SD
    order = np.argsort(np.square(residuals(starts)).sum(axis=0))
    fits: list[OptimizeResult] = []
    for column in order[:_STARTS_KEPT]:
        fits.append(_minimise(residuals, starts[:, column]))
        if fits[-1].cost < n:  # the mean squared residual is within the noise: no other start can do much better
            break
    best = min(fits, key=lambda fit: fit.cost)
    forecast = trajectories(best.x[:, None], n + steps)[n:, :, 0]
    return forecast if np.all(np.isfinite(forecast)) else last_value(context, steps, dt)


def _minimise(residuals: Callable[[np.ndarray], np.ndarray], start: np.ndarray) -> OptimizeResult:
    """Least squares from one starting point; residuals and Jacobian come from one integration of nine systems."""
    shifts = np.concatenate([np.zeros((8, 1)), _DIFFERENCE * np.eye(8)], axis=1)  # (8, 9)
    latest: dict[bytes, np.ndarray] = {}  # the Jacobian is asked for where the residuals were just evaluated

    def value(z: np.ndarray) -> np.ndarray:
        rows = residuals(z[:, None] + shifts)  # (2n + 6, 9)
        latest.clear()
        latest[z.tobytes()] = (rows[:, 1:] - rows[:, :1]) / _DIFFERENCE
        return rows[:, 0]

    def jacobian(z: np.ndarray) -> np.ndarray:
        if z.tobytes() not in latest:
            value(z)
        return latest[z.tobytes()]

    return least_squares(
        value, start, jac=jacobian, method="lm", ftol=_RELATIVE_TOLERANCE, xtol=1e-7, gtol=1e-9, max_nfev=60
    )


def _integral_matching(context: np.ndarray, dt: float, h: float) -> np.ndarray:
    """Rough (r, K, a, h, e, d) for a given h, by linear least squares on the equations integrated over each step.

    ``Δ ln x = r Δt − (r/K) ∫x − a ∫ y/(1+hx)`` and ``Δ ln y = e a ∫ x/(1+hx) − d Δt`` are linear in r, r/K, a, e·a
    and d. The integrals are of the cubic through four neighbouring steps (trapezia at the ends). The prior's centre is
    added as one weak observation of each unknown.
    """
    x, y = np.maximum(context, _FLOOR).T
    r, capacity, a, _, e, d = np.exp(_PRIOR_MEAN)

    def area(values: np.ndarray) -> np.ndarray:  # (n,) -> (n - 1,)
        areas = (values[1:] + values[:-1]) / 2
        areas[1:-1] += (values[1:-2] + values[2:-1] - values[:-3] - values[3:]) / 24
        return dt * areas

    def solve(population: np.ndarray, columns: list[np.ndarray], prior: np.ndarray) -> np.ndarray:
        # A difference of logs is as uncertain as noise / population, so the smaller end is its weight (noise 0.05: the
        # integrals are not exact); the prior weighs 0.3 of such a row.
        weight = np.minimum(population[1:], population[:-1]) / 0.05
        design = np.concatenate([np.stack(columns, axis=1) * weight[:, None], np.diag(0.3 / prior)])
        target = np.concatenate([np.diff(np.log(population)) * weight, np.full(len(prior), 0.3)])
        return np.clip(np.linalg.lstsq(design, target, rcond=None)[0], prior / 10, prior * 10)

    elapsed = np.full(len(x) - 1, dt)
    response = 1 / (1 + h * x)
    growth, crowding, a = solve(x, [elapsed, -area(x), -area(y * response)], np.array([r, r / capacity, a]))
    conversion, d = solve(y, [area(x * response), -elapsed], np.array([e * a, d]))
    return np.array([growth, growth / crowding, a, h, conversion / a, d])


def last_season(context: np.ndarray, steps: int, dt: float) -> np.ndarray:
    """`seasonal_naive`: the last season repeated, or the last value where no season shows; arguments as of `last_value`."""
    return seasonal_naive(_checked(context, steps), steps)


def context_parroting(context: np.ndarray, steps: int, dt: float) -> np.ndarray:
    """`parrot`: what followed the past motif nearest to the last steps; arguments as of `last_value`."""
    return parrot(_checked(context, steps), steps)


#: The baselines of every table, by the name the table shows.
BASELINES: dict[str, Callable[[np.ndarray, int, float], np.ndarray]] = {
    "last value": last_value,
    "seasonal naive": last_season,
    "context parroting": context_parroting,
    "vector autoregression": vector_autoregression,
    "ODE fit": ode_fit,
}


def run_baselines(
    cases: Sequence[tuple[np.ndarray, int]], dt: float, cache: Path, key: str, progress: bool = False
) -> dict[str, list[np.ndarray]]:
    """Forecast every case with every baseline, or read the forecasts from the cache, which is made whole where one is missing.

    Parameters
    ----------
    cases : list of (context (n, v), steps)
        What to forecast; lengths may differ, v may not.
    dt : float
        Time between two steps.
    cache : path-like
        Folder of the cache; one file ``<key>.npz`` per key.
    key : str
        Names the cases: the data's hash, protocol, split and context. A file of that name made from other
        cases, another `dt` or an older version of the baselines is computed again and replaced.
    progress : bool
        Show a progress bar with the time left while computing.

    Returns
    -------
    dict of str to list of arrays (steps, v)
        One list per name in `BASELINES`, in the order of `cases`.
    """
    if not cases:
        return {name: [] for name in BASELINES}
    path = Path(cache) / f"{key}.npz"
    fingerprint = _fingerprint(cases, dt)
    ends = np.cumsum([steps for _, steps in cases])[:-1]
    stored = _read_cache(path, fingerprint) or _read_cache(SHIPPED_BASELINES / path.name, fingerprint)
    missing = [name for name in BASELINES if name not in stored]
    if missing:
        forecasts: dict[str, list[np.ndarray]] = {name: [] for name in missing}
        for context, steps in tqdm(cases, desc="baselines", unit="window", leave=False, disable=not progress):
            for name in missing:
                forecasts[name].append(BASELINES[name](context, steps, dt))
        stored |= {name: np.concatenate(parts) for name, parts in forecasts.items()}
        with atomic_path(path) as temporary, open(temporary, "wb") as stream:
            np.savez(stream, fingerprint=np.array(fingerprint), **stored)  # type: ignore[arg-type]  # none is `allow_pickle`
    return {name: np.split(stored[name], ends) for name in BASELINES}


def _read_cache(path: Path, fingerprint: str) -> dict[str, np.ndarray]:
    """Stored forecasts, each (total steps, v); none if the file is missing, damaged or made from something else."""
    try:
        with np.load(path, allow_pickle=False) as file:
            if str(file["fingerprint"]) != fingerprint:
                return {}
            return {name: file[name] for name in file.files if name != "fingerprint"}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return {}


def _fingerprint(cases: Sequence[tuple[np.ndarray, int]], dt: float) -> str:
    """SHA-256 of the cases' numbers, `dt` and the baselines' version."""
    digest = hashlib.sha256(repr((_VERSION, float(dt))).encode())
    for context, steps in cases:
        context = np.ascontiguousarray(context, dtype=np.float64)
        digest.update(repr((context.shape, int(steps))).encode())
        digest.update(context.tobytes())
    return digest.hexdigest()


def _checked(context: np.ndarray, steps: int) -> np.ndarray:
    """The context as float64 (n, v), refused when no baseline could use it."""
    context = np.asarray(context, dtype=np.float64)
    if context.ndim != 2 or 0 in context.shape:
        raise UserError(f"context of shape {context.shape}: give at least one step, as (steps, variables)")
    if not np.all(np.isfinite(context)) or np.any(context < 0):
        raise UserError("context has a value that is negative or not finite: populations are finite and at least 0")
    if steps < 1:
        raise UserError(f"cannot forecast {steps} steps: ask for at least 1")
    return context
