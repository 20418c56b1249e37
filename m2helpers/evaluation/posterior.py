"""What a context tells of a system whose law is known: draws of its parameters given text, and of its future.

A number that is written is known to half a unit of its last decimal, and one that the context cuts by the digits that are
there. So the posterior of the eight parameters is their prior within sharp bounds. It is sampled by `emcee`, an ensemble of walkers that
needs no slopes, which bounds do not have, and that no linear distortion slows down (Foreman-Mackey et al., 2013). Three things make it mix:

- Coordinates r, r/K, a, h, e·a, d, x0, y0. Given h, the equations are linear in the others, so the bounds are nearly straight.
- Slices along the difference of two walkers (`ChordMove`): at sharp edges, a jump is refused nine times in ten.
- A start from the prior with bounds loosened, which tighten step by step with the walkers resampled on the way (Del Moral et al.,
  2006), so that few wrong minima keep them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from scipy.stats import norm

from ..files import UserError
from ..simulator import Law, integrate
from .bounds import Reading

try:
    import emcee
    from numba import njit
except ImportError:
    raise UserError("the floor needs emcee and numba; pip install 'm2helpers[floor]'") from None

_SUBSTEPS = 5  # of a step of the series: the largest error over 100 steps is below 2e-4 in 99 of 100 systems
_KNOTS = 32  # pieces of a margin, even in share: the density is a histogram
_SOFTNESS = (
    0.002  # in units of the last decimal: what is left of the loosening; at 0.05, edges that soft made draws too wide
)
_PRIOR_DRAWS = 8192  # that the first walkers are chosen from
_STARTS = 3
_SWEEPS_BETWEEN = 3  # of all walkers, after each tightening
_SWEEPS = 240  # of a chain
_DOUBLINGS = 4  # of its length
_THIN = 4  # sweeps between kept ones
_EXPANSIONS = 4  # of a slice, to either side
_SHRINKINGS = 24  # after which a walker stays where it was


class _Known(NamedTuple):
    """The law, as the compiled functions take it."""

    knots: np.ndarray
    """Quantiles of every parameter at even shares, (8, n)."""
    scores: np.ndarray
    """Quantiles of the standard normal at even shares."""
    precision: np.ndarray
    """Of the scores of the parameters that have a prior, (8, 8) or (6, 6)."""
    dt: float


class _Seen(NamedTuple):
    """A `Reading`, as the compiled functions take it."""

    low: np.ndarray
    high: np.ndarray
    period: float
    residue: float
    first: tuple[int, int]
    pieces: np.ndarray
    last: tuple[int, int]
    unit: float


@dataclass(frozen=True)
class Draws:
    """Draws from the posterior of a window."""

    parameters: np.ndarray
    """(draws, 8), columns `PARAMETERS`."""
    future: np.ndarray
    """The values asked for, (draws, steps, 2), in the units of the series."""
    effective: float
    """Effective number of draws, of the value that has the fewest."""
    rhat: float
    """Split R-hat across walkers of the value with the largest (Gelman et al., 2013); infinite if the bounds were never met."""
    sweeps: int
    """Of the walkers, that the draws are from."""


@njit(cache=True)
def _parameters(point: np.ndarray) -> np.ndarray:
    """Parameters in the order of `PARAMETERS` from coordinates: r, r/K, a, h, e a, d, x0, y0."""
    r, crowding, a, h, conversion, d, x, y = point
    return np.array([r, r / crowding, a, h, conversion / a, d, x, y])


def _points(parameters: np.ndarray) -> np.ndarray:
    """`_parameters` the other way round, for many systems: (n, 8)."""
    r, capacity, a, h, e, d, x, y = parameters.T
    return np.stack([r, r / capacity, a, h, e * a, d, x, y], axis=1)


@njit(cache=True)
def _advance(p: np.ndarray, x: float, y: float, step: float) -> tuple[float, float]:
    """`simulator.integrate` over one step, not in logarithms: three times as fast, and as exact with two substeps more."""
    crowding, conversion, step = p[0] / p[1], p[4] * p[2], step / _SUBSTEPS
    for _ in range(_SUBSTEPS):
        dx, dy, u, v = 0.0, 0.0, x, y
        for stage in range(4):
            response = u / (1.0 + p[3] * u)
            ku = (p[0] - crowding * u) * u - p[2] * response * v
            kv = (conversion * response - p[5]) * v
            weight = 2.0 if stage == 1 or stage == 2 else 1.0
            dx, dy = dx + weight * ku, dy + weight * kv
            reach = step if stage == 2 else 0.5 * step
            u, v = x + reach * ku, y + reach * kv
        x, y = x + step / 6.0 * dx, y + step / 6.0 * dy
    return x, y


@njit(cache=True)
def _misfit(point: np.ndarray, law: _Known, seen: _Seen, most: float) -> float:
    """By how much a system, (8,), breaks the bounds: a sum of squares in units of the last decimal; above `most` unfinished."""
    p = _parameters(point)
    x, y, total = p[6], p[7], 0.0
    for i in range(len(seen.low)):
        if i:
            x, y = _advance(p, x, y, law.dt)
        for j in range(2):
            value = seen.unit * (y if j else x)
            total += max(0.0, seen.low[i, j] - value, value - seen.high[i, j]) ** 2
            if seen.period > 1 and i == seen.first[0] and j == seen.first[1]:
                away = (value - seen.residue + 0.5 * seen.period) % seen.period - 0.5 * seen.period
                total += max(0.0, abs(away) - 0.5) ** 2
            if len(seen.pieces) and i == seen.last[0] and j == seen.last[1]:
                least = np.inf
                for k in range(len(seen.pieces)):
                    least = min(least, max(0.0, seen.pieces[k, 0] - value, value - seen.pieces[k, 1]))
                total += least**2
        if not total <= most:  # a number that is none as well
            return np.inf
    return total


@njit(cache=True)
def _misfits(points: np.ndarray, law: _Known, seen: _Seen) -> np.ndarray:
    """`_misfit` of many systems, (n, 8): (n,)."""
    out = np.empty(len(points))
    for n in range(len(points)):
        out[n] = _misfit(points[n], law, seen, np.inf)
    return out


@njit(cache=True)
def _prior(point: np.ndarray, law: _Known) -> float:
    """Logarithm of the law's density at a point, up to a constant."""
    p, scores, total = _parameters(point), np.empty(8), 0.0
    for i in range(len(law.precision)):
        knots = law.knots[i]
        if not knots[0] < p[i] < knots[-1]:
            return -np.inf
        below = np.searchsorted(knots, p[i]) - 1
        width = knots[below + 1] - knots[below]
        share = (below + (p[i] - knots[below]) / width) / (len(knots) - 1)
        place = share * (len(law.scores) - 1)
        scores[i] = law.scores[int(place)] + (place - int(place)) * (
            law.scores[int(place) + 1] - law.scores[int(place)]
        )
        total += 0.5 * scores[i] ** 2 - math.log(width)
    for i in range(len(law.precision)):
        for j in range(len(law.precision)):
            total -= 0.5 * scores[i] * law.precision[i, j] * scores[j]
    for i in range(len(law.precision), 8):  # even in logarithms
        if not p[i] > 0.0:
            return -np.inf
        total -= math.log(p[i])
    # The change of coordinates: K = r / crowding, e = conversion / a.
    return total + math.log(p[1] ** 2 / p[0]) - math.log(p[2])


@njit(cache=True)
def _priors(points: np.ndarray, law: _Known) -> np.ndarray:
    """`_prior` of many points, (n, 8): (n,)."""
    out = np.empty(len(points))
    for n in range(len(points)):
        out[n] = _prior(points[n], law)
    return out


@njit(cache=True)
def _slide(start: np.ndarray, way: np.ndarray, shares: np.ndarray, law: _Known, seen: _Seen, tightness: float):  # type: ignore[no-untyped-def]
    """Slice sampling along a line each (Neal, 2003): where systems, (n, 8), come to along their ways, and both log densities.

    Randomness comes in as `shares`, (n, 3 + shrinkings), even draws from 0 to 1.
    """
    ends, before, after = start.copy(), np.empty(len(start)), np.empty(len(start))
    for n in range(len(start)):
        before[n] = _prior(start[n], law) - 0.5 * tightness * _misfit(start[n], law, seen, np.inf)
        level = before[n] + math.log(shares[n, 0] + 1e-300)
        after[n] = before[n]
        left = -shares[n, 1]
        right = left + 1.0
        for side in range(2):
            for _ in range(_EXPANSIONS):
                place = start[n] + (right if side else left) * way[n]
                prior = _prior(place, law)
                if prior < level or _misfit(place, law, seen, 2.0 * (prior - level) / tightness) == np.inf:
                    break
                if side:
                    right += 1.0
                else:
                    left -= 1.0
        for k in range(2, shares.shape[1]):
            reach = left + shares[n, k] * (right - left)
            place = start[n] + reach * way[n]
            prior = _prior(place, law)
            if prior >= level:
                misfit = _misfit(place, law, seen, 2.0 * (prior - level) / tightness)
                if misfit < np.inf:
                    ends[n], after[n] = place, prior - 0.5 * tightness * misfit
                    break
            if reach < 0.0:
                left = reach
            else:
                right = reach
    return ends, before, after


@njit(cache=True)
def _futures(points: np.ndarray, law: _Known, start: int, steps: int) -> np.ndarray:
    """Steps of systems, (n, 8), from one on: (n, steps, 2)."""
    out = np.empty((len(points), steps, 2))
    for n in range(len(points)):
        p = _parameters(points[n])
        x, y = p[6], p[7]
        for i in range(start + steps):
            if i:
                x, y = _advance(p, x, y, law.dt)
            if i >= start:
                out[n, i - start, 0], out[n, i - start, 1] = x, y
    return out


class ChordMove(emcee.moves.RedBlueMove):
    """Slice sampling along the difference of two walkers of the other half (Karamanis and Beutler, 2021).

    A stretch or a jump by such a difference is refused nine times in ten at edges this sharp; a slice ends inside them.
    """

    def __init__(self, law: _Known, seen: _Seen, tightness: float) -> None:
        super().__init__()
        self.law, self.seen, self.tightness = law, seen, tightness

    def get_proposal(
        self, sample: np.ndarray, complement: list[np.ndarray], random: np.random.RandomState
    ) -> tuple[np.ndarray, np.ndarray]:
        """Where half of the walkers, (n, 8), come to, and the factors by which `emcee` accepts that always."""
        others = np.concatenate(complement)
        one = random.randint(len(others), size=len(sample))
        two = (one + 1 + random.randint(len(others) - 1, size=len(sample))) % len(others)
        shares = random.uniform(size=(len(sample), 2 + _SHRINKINGS))
        ends, before, after = _slide(sample, others[one] - others[two], shares, self.law, self.seen, self.tightness)
        return ends, before - after


def sample(law: Law, reading: Reading, future: range, *, seed: list[int], mixed: float, walkers: int = 64) -> Draws:
    """Draw systems from the posterior of a window, and what follows in each.

    The prior is the law; of a window inside a series, whose age nobody tells, it is that of the six rates alone, and even in the
    logarithms of the state that the window begins in. The chain is begun afresh where its walkers ended outside of the bounds, and doubled until it has mixed, a few times each.

    Parameters
    ----------
    law : Law
        Its margins are smoothed a little, to have a density.
    reading : Reading
    future : range
        Steps that are asked for, counted from the one that the window begins in.
    mixed : float
        Split R-hat below which a chain is not made longer.
    walkers : int
        Of the ensemble, even.
    """
    known, seen = _known(law, reading.begins), _seen(reading)
    pool = _pool(law, reading.begins)
    draw = np.random.default_rng(seed)
    for _ in range(_STARTS):
        walking = _settle(pool, known, seen, draw, walkers)
        broken = np.sqrt(np.median(_misfits(walking.coords, known, seen)))
        if broken < 1.0:
            break
    sampler, sweeps = _ensemble(known, seen, walkers, _SOFTNESS**-2), _SWEEPS
    for doubling in range(_DOUBLINGS + 1):
        walking = sampler.run_mcmc(walking, sweeps // _THIN, thin_by=_THIN, skip_initial_state_check=True)
        chain = sampler.get_chain()  # (kept sweeps, walkers, 8)
        flat = chain.reshape(-1, 8)
        paths = _futures(flat, known, future.start, len(future))
        values = paths.reshape(*chain.shape[:2], -1)
        rhat = split_rhat(values) if broken < 1.0 else np.inf
        if rhat < mixed or doubling == _DOUBLINGS:
            break
        sampler.reset()
        sweeps *= 2
    times = emcee.autocorr.integrated_time(values, tol=0)
    effective = values.shape[0] * values.shape[1] / max(1.0, np.max(times))
    return Draws(np.stack([_parameters(point) for point in flat]), paths, float(effective), rhat, len(chain) * _THIN)


def _known(law: Law, begins: bool) -> _Known:
    shares, count = np.linspace(0.0, 1.0, _KNOTS + 1), 8 if begins else 6
    knots = law.quantiles(np.repeat(shares[:, None], 8, axis=1)).T.copy()
    scores = norm.ppf(np.linspace(0.0, 1.0, 4097).clip(1e-5, 1 - 1e-5))
    return _Known(knots, scores, np.linalg.inv(law.correlation[:count, :count]), law.dt)


def _seen(reading: Reading) -> _Seen:
    period, residue = map(float, reading.lattice)
    ends = (reading.first, reading.pieces, reading.last)
    return _Seen(reading.low, reading.high, period, residue, *ends, reading.unit)


def _ensemble(known: _Known, seen: _Seen, walkers: int, tightness: float) -> emcee.EnsembleSampler:
    def log_posterior(points: np.ndarray) -> np.ndarray:
        return np.maximum(_priors(points, known) - 0.5 * tightness * _misfits(points, known, seen), -1e300)

    return emcee.EnsembleSampler(walkers, 8, log_posterior, moves=ChordMove(known, seen, tightness), vectorize=True)


@lru_cache(maxsize=2)
def _pool(law: Law, begins: bool) -> np.ndarray:
    """Points of systems drawn from the law, (n, 8), at the beginning or at any step: what walkers are chosen from."""
    parameters = law.draw(_PRIOR_DRAWS, 0)
    if not begins:
        paths = integrate(parameters.T[:6], parameters.T[6:], law.steps, law.dt)  # (steps, 2, n)
        places = np.random.default_rng(0).integers(law.steps, size=_PRIOR_DRAWS)
        parameters[:, 6:] = np.maximum(paths[places, :, np.arange(_PRIOR_DRAWS)], 1e-3)
    return _points(parameters)


def _settle(points: np.ndarray, known: _Known, seen: _Seen, draw: np.random.Generator, walkers: int) -> emcee.State:
    """Walkers led from the prior to the posterior by bounds that tighten as fast as half of them can follow."""
    tightness, goal = 0.0, _SOFTNESS**-2
    while True:
        costs = _misfits(points, known, seen)
        more = _tightening(costs, goal - tightness, 0.5 * walkers if tightness else walkers)
        weights = np.exp(-0.5 * more * (costs - costs.min()))
        places = (draw.uniform() + np.arange(walkers)) / walkers  # systematic resampling
        points = points[np.searchsorted(np.cumsum(weights) / weights.sum(), places).clip(max=len(points) - 1)]
        tightness += more
        start = emcee.State(points, random_state=np.random.RandomState(draw.integers(2**32)).get_state())
        sampler = _ensemble(known, seen, walkers, tightness)
        walking = sampler.run_mcmc(start, _SWEEPS_BETWEEN, store=False, skip_initial_state_check=True)
        if tightness >= goal:
            return walking
        points = walking.coords


def _tightening(costs: np.ndarray, most: float, effective: float) -> float:
    """The largest tightening, up to `most`, that leaves so many draws effective."""

    def left(more: float) -> float:
        weights = np.exp(-0.5 * more * (costs - costs.min()))
        return weights.sum() ** 2 / np.square(weights).sum()

    if left(most) >= effective:
        return most
    low, high = most * 1e-14, most
    while high > 1.01 * low:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if left(middle) >= effective else (low, middle)
    return low


def split_rhat(values: np.ndarray) -> float:
    """The largest split R-hat of values (sweeps, walkers, quantities): each walker's two halves are chains of their own."""
    half = len(values) // 2
    chains = np.concatenate([values[:half], values[half : 2 * half]], axis=1)  # (half, 2 walkers, quantities)
    within = chains.var(axis=0, ddof=1).mean(axis=0)
    between = chains.mean(axis=0).var(axis=0, ddof=1)
    return float(np.sqrt((half - 1) / half + between / np.maximum(within, 1e-300)).max())
