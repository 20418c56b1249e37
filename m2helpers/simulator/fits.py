"""The predator-prey equations fitted to many whole series at once, by damped least squares from several starts."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from tqdm.auto import tqdm

from .equations import integrate

ACCEPTED = 1e-6
"""Half a sum of squares, in population units, below which a series counts as fitted: a root mean square of 1e-4 over 200 values."""

_SATURATIONS = (0.03, 0.1, 0.2, 0.4, 0.7, 1.2, 2.0, 0.0)  # h times the mean prey, of the starts
_DONE = 1e-9  # a fit below this is not improved further
_ITERATIONS = 60  # of one start
_SHIFT = 1e-6  # of a logarithm, for slopes by differences
_RANGE = (np.log(1e-5), np.log(1e3))  # of every parameter
_LEAST = 1e-12  # stands for what has no logarithm


class Point(NamedTuple):
    """Where the fits of m series stand."""

    costs: np.ndarray
    """Half the sums of squares, (m,)."""
    slopes: np.ndarray
    """Of the costs, (m, 6)."""
    curvatures: np.ndarray
    """Gauss and Newton's, (m, 6, 6)."""


def fit_systems(series: np.ndarray, dt: float, *, progress: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Fit the equations to whole series that are known exactly, not rounded.

    The first step is the starting state; the logarithms of r, K, a, h, e, d are fitted by the method of Levenberg (1944)
    and Marquardt (1963), for all series side by side. They start from the linear least-squares solution of the equations
    integrated from step to step, for a value of h; where that ends in a wrong minimum, the next value is tried.

    Parameters
    ----------
    series : array (n, steps, 2)
        Prey and predators, positive.
    dt : float
        Time between two steps.

    Returns
    -------
    parameters : float64 (n, 8)
        Columns `PARAMETERS`.
    costs : float64 (n,)
        Half the sums of squares that are left.
    """
    series = np.maximum(np.asarray(series, np.float64), _LEAST)
    best, costs = np.full((len(series), 6), np.nan), np.full(len(series), np.inf)
    for saturation in tqdm(_SATURATIONS, desc="fits", unit="start", leave=False, disable=not progress):
        todo = np.flatnonzero(costs > ACCEPTED)
        if not len(todo):
            break
        start = matched(series[todo], dt, saturation / series[todo, :, 0].mean(axis=1))
        found, cost = _descend(series[todo], dt, start)
        better = cost < costs[todo]
        best[todo[better]], costs[todo[better]] = found[better], cost[better]
    return np.hstack([np.exp(best), series[:, 0]]), costs


def matched(series: np.ndarray, dt: float, h: np.ndarray) -> np.ndarray:
    """Logarithms of rough parameters, (n, 6), for given values of h, (n,).

    ``Δ ln x = r Δt − (r/K) ∫x − a ∫ y/(1+hx)`` and ``Δ ln y = e a ∫ x/(1+hx) − d Δt`` are linear in r, r/K, a, e·a and d.
    The integrals are of the cubic through four neighbouring steps (trapezia at the ends).
    """
    x, y = series[..., 0], series[..., 1]  # (n, steps)

    def area(values: np.ndarray) -> np.ndarray:  # (n, steps) -> (n, steps - 1)
        areas = (values[:, 1:] + values[:, :-1]) / 2
        areas[:, 1:-1] += (values[:, 1:-2] + values[:, 2:-1] - values[:, :-3] - values[:, 3:]) / 24
        return dt * areas

    def solve(population: np.ndarray, columns: list[np.ndarray]) -> np.ndarray:  # (n, unknowns)
        weight = np.minimum(population[:, 1:], population[:, :-1])  # errors matter in populations, not in logarithms
        design = np.stack(columns, axis=2) * weight[..., None]
        target = np.diff(np.log(population), axis=1) * weight
        return np.stack([np.linalg.lstsq(a, b, rcond=None)[0] for a, b in zip(design, target, strict=True)])

    elapsed, response = np.full((len(x), x.shape[1] - 1), dt), 1 / (1 + h[:, None] * x)
    r, crowding, a = solve(x, [elapsed, -area(x), -area(y * response)]).T
    conversion, d = solve(y, [area(x * response), -elapsed]).T
    with np.errstate(divide="ignore", invalid="ignore"):
        values = np.stack([r, r / crowding, a, h, conversion / a, d], axis=1)
    values = np.nan_to_num(values, nan=_LEAST)
    return np.log(np.clip(values, *np.exp(_RANGE)))


def _descend(series: np.ndarray, dt: float, logs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Damped least squares from a start, (n, 6): the best logarithms, and their costs."""
    logs, damping = logs.copy(), np.full(len(series), 1e-2)
    at = _evaluate(series, dt, logs)
    going = np.flatnonzero(np.isfinite(at.costs))
    for _ in range(_ITERATIONS):
        going = going[(at.costs[going] > _DONE) & (damping[going] < 1e8)]
        if not len(going):
            break
        diagonal = np.einsum("nii->ni", at.curvatures[going])
        damped = at.curvatures[going] + np.eye(6) * (damping[going, None] * diagonal + 1e-12)[:, None, :]
        move = -np.linalg.solve(damped, at.slopes[going][..., None])[..., 0]
        trial = np.clip(logs[going] + np.clip(move, -1.0, 1.0), *_RANGE)
        there = _evaluate(series[going], dt, trial)
        better = there.costs < at.costs[going]
        taken = going[better]
        logs[taken] = trial[better]
        for ours, theirs in zip(at, there, strict=True):
            ours[taken] = theirs[better]
        damping[going] *= np.where(better, 0.2, 5.0)
    return logs, at.costs


def _evaluate(series: np.ndarray, dt: float, logs: np.ndarray) -> Point:
    """Costs, their slopes and curvatures at logarithms (n, 6), from one integration of seven systems a series."""
    n, steps, _ = series.shape
    shifted = np.concatenate([logs[None], logs + _SHIFT * np.eye(6)[:, None, :]])  # (7, n, 6)
    starts = np.tile(series[:, 0].T, 7)  # (2, 7 n)
    paths = integrate(np.exp(shifted).reshape(-1, 6).T, starts, steps, dt).reshape(steps, 2, 7, n)
    with np.errstate(invalid="ignore", over="ignore"):
        errors = paths[:, :, 0] - series.transpose(1, 2, 0)  # (steps, 2, n)
        changes = np.nan_to_num((paths[:, :, 1:] - paths[:, :, :1]) / _SHIFT, posinf=0.0, neginf=0.0)
        costs = 0.5 * np.square(errors).sum(axis=(0, 1))
    costs[~np.isfinite(costs)] = np.inf
    errors = np.nan_to_num(errors, posinf=0.0, neginf=0.0)
    slopes = np.einsum("tvin,tvn->ni", changes, errors)
    curvatures = np.einsum("tvin,tvjn->nij", changes, changes, optimize=True)
    return Point(costs, slopes, curvatures)
