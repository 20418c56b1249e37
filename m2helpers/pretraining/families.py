"""Families of dynamics for pre-training, none of them a predator–prey system.

Each draws `n` systems at once and returns them sampled evenly: an array (n, steps, dimensions).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .dynamics import (
    anharmonic_oscillator,
    brusselator,
    delayed_feedback,
    duffing,
    epidemic,
    fitzhugh_nagumo,
    gaussian_process,
    gierer_meinhardt,
    goodwin,
    growth_and_decay,
    integrate,
    lengyel_epstein,
    log_uniform,
    lorenz,
    modulated_oscillations,
    noise_with_memory,
    pendulum,
    phases,
    random_networks,
    repressilator,
    rossler,
    smooth_random,
    steps_and_spikes,
    trend_and_season,
    two_species_competition,
    van_der_pol,
)

Family = Callable[[np.random.Generator, int, int], np.ndarray]

FAMILIES: dict[str, Family] = {}


def _family(function: Family) -> Family:
    FAMILIES[function.__name__] = function
    return function


def _pool(systems: list[Family], rng: np.random.Generator, n: int, steps: int) -> np.ndarray:
    """Two variables of each of several systems, in equal shares: (n, steps, 2)."""
    share = -(-n // len(systems))
    return rng.permutation(np.concatenate([system(rng, share, steps)[:, :, :2] for system in systems]))[:n]


@_family
def damped_oscillations(rng: np.random.Generator, n: int, steps: int) -> np.ndarray:
    """Two sinusoids of one period, apart in phase, that die away (or, rarely, grow), with a harmonic."""
    phase = phases(rng, n, steps)
    rate = -rng.choice([0, 1, 1, 1, -0.2], (n, 1)) * log_uniform(rng, 0.003, 0.04, (n, 1))
    envelope = np.exp(rate * np.arange(steps))
    lag, harmonic = rng.uniform(0.3, 2.8, (n, 1)), rng.uniform(0, 0.4, (n, 1))
    waves = [envelope * (np.sin(p) + harmonic * envelope * np.sin(2 * p)) for p in (phase, phase - lag)]
    return np.stack(waves, axis=-1)


@_family
def exponential_oscillations(rng: np.random.Generator, n: int, steps: int) -> np.ndarray:
    """Exponentials of damped oscillations: sharp peaks, long low stretches."""
    return np.exp(log_uniform(rng, 0.3, 2.5, (n, 1, 1)) * damped_oscillations(rng, n, steps))


@_family
def linear_systems(rng: np.random.Generator, n: int, steps: int) -> np.ndarray:
    """Three coupled linear equations, every mode damped or neutral."""
    matrix = rng.normal(0, 0.5, (3, 3, n))
    matrix = matrix - matrix.transpose(1, 0, 2) * rng.uniform(0.2, 1, n)  # mostly rotation
    growth = np.linalg.eigvals(matrix.transpose(2, 0, 1)).real.max(axis=1)
    matrix -= np.eye(3)[:, :, None] * (growth + log_uniform(rng, 0.003, 0.1, n))
    return integrate(lambda s: np.einsum("ijn,jn->in", matrix, s), rng.normal(0, 1, (3, n)), 6.0, rng, steps)


@_family
def relaxation_oscillators(rng: np.random.Generator, n: int, steps: int) -> np.ndarray:
    """Slow creep and sudden jumps: a triode, a nerve, a reaction that feeds itself."""
    return _pool([van_der_pol, fitzhugh_nagumo, brusselator], rng, n, steps)


@_family
def glycolysis(rng: np.random.Generator, n: int, steps: int) -> np.ndarray:
    """Sel'kov's model of glycolysis (1968), damped or cycling."""
    a, b = rng.uniform(0.04, 0.14, n), rng.uniform(0.35, 0.9, n)

    def field(s: np.ndarray) -> np.ndarray:
        return np.stack([-s[0] + a * s[1] + s[0] ** 2 * s[1], b - a * s[1] - s[0] ** 2 * s[1]])

    return integrate(field, rng.uniform(0.3, 2, (2, n)), 8.0, rng, steps, 10)


@_family
def pendulums_and_springs(rng: np.random.Generator, n: int, steps: int) -> np.ndarray:
    """Mechanical oscillators with a restoring force that is not linear."""
    return _pool([pendulum, duffing, anharmonic_oscillator], rng, n, steps)


@_family
def limit_cycle_normal_form(rng: np.random.Generator, n: int, steps: int) -> np.ndarray:
    """Stuart–Landau oscillator: a spiral on to a circle, or into a point."""
    growth, twist = rng.uniform(-0.15, 0.3, n), rng.uniform(-0.8, 0.8, n)

    def field(s: np.ndarray) -> np.ndarray:
        square = (s**2).sum(0)
        real, imaginary = growth - square, 1 - twist * square
        return np.stack([real * s[0] - imaginary * s[1], imaginary * s[0] + real * s[1]])

    return integrate(field, rng.uniform(-1, 1, (2, n)), 6.3, rng, steps)


@_family
def nonlinear_oscillators(rng: np.random.Generator, n: int, steps: int) -> np.ndarray:
    """A weight whose speed bends with its momentum, on a spring that bends too: smooth rising curves drawn at random."""
    height, knee = np.abs(rng.normal(0, 1, (2, 4, n))), rng.normal(0, 1.2, (2, 4, n))
    slope, friction = log_uniform(rng, 0.4, 2, (2, 4, n)), log_uniform(rng, 0.003, 0.1, n)
    rest, whole = np.tanh(slope * knee), height.sum(axis=1)  # (2, 4, n) and (2, n)

    def curve(i: int, x: np.ndarray) -> np.ndarray:
        rise = np.tanh(slope[i] * (x - knee[i])) + rest[i]  # (4, n), nought at nought
        return 1.5 * (height[i] * rise).sum(0) / whole[i]

    def field(s: np.ndarray) -> np.ndarray:
        return np.stack([curve(0, s[1]), -curve(1, s[0])]) - friction * s

    return integrate(field, rng.normal(0, 1, (2, n)), 6.3, rng, steps)


@_family
def feedback_loops(rng: np.random.Generator, n: int, steps: int) -> np.ndarray:
    """Products that shut off their own making, or one another's, a few stages away: damped or cycling."""
    return _pool([goodwin, repressilator], rng, n, steps)


@_family
def activator_inhibitor(rng: np.random.Generator, n: int, steps: int) -> np.ndarray:
    """Reactions of which one product speeds up its own making and that of its brake, damped or cycling."""
    return _pool([gierer_meinhardt, lengyel_epstein], rng, n, steps)


@_family
def thermokinetics(rng: np.random.Generator, n: int, steps: int) -> np.ndarray:
    """A fuel fed in evenly that burns faster the hotter it gets (Salnikov 1949), damped or cycling."""
    heat = rng.uniform(1.05, 1.5, n)  # temperature at rest
    feed = (heat - 1 + rng.uniform(-0.01, 0.12, n)) / np.exp(heat)  # near the edge between rest and cycle

    def field(s: np.ndarray) -> np.ndarray:
        return np.stack([feed * (heat - s[0] * np.exp(s[1])), s[0] * np.exp(s[1]) - s[1]])

    start = np.stack([heat * np.exp(-heat) * rng.uniform(0.4, 1.8, n), heat * rng.uniform(0.4, 1.6, n)])
    return integrate(field, start, 6.3 / np.sqrt(feed * np.exp(heat)), rng, steps, 12)


@_family
def schnakenberg(rng: np.random.Generator, n: int, steps: int) -> np.ndarray:
    """Autocatalysis fed from both sides (Schnakenberg 1979), damped or cycling."""
    a, b = rng.uniform(0.02, 0.2, n), rng.uniform(0.4, 1.2, n)

    def field(s: np.ndarray) -> np.ndarray:
        return np.stack([a - s[0] + s[0] ** 2 * s[1], b - s[0] ** 2 * s[1]])

    return integrate(field, rng.uniform(0.2, 2, (2, n)), 7.0, rng, steps, 10)


@_family
def chaotic_flows(rng: np.random.Generator, n: int, steps: int) -> np.ndarray:
    """Lorenz's convection, Rössler's band, feedback that comes late, random smooth equations."""
    return _pool([lorenz, rossler, delayed_feedback, random_networks], rng, n, steps)


@_family
def without_cycles(rng: np.random.Generator, n: int, steps: int) -> np.ndarray:
    """Ways to a rest, and what no equation foretells: growth, competition, epidemics; random processes, steps and spikes."""
    rests = [growth_and_decay, two_species_competition, epidemic]
    return _pool([*rests, gaussian_process, noise_with_memory, trend_and_season, steps_and_spikes], rng, n, steps)


def _product(rng: np.random.Generator, n: int, steps: int) -> np.ndarray:
    """The product of two other families' variables, term by term."""
    first, second = damped_oscillations(rng, n, steps), smooth_random(rng, n, steps)[:, :, :2]
    scale = np.abs(second).max(axis=(1, 2), keepdims=True)
    return first * (1.2 + second / scale)


@_family
def products(rng: np.random.Generator, n: int, steps: int) -> np.ndarray:
    """Oscillations whose amplitude changes: with a slow beat, or as a smooth random series does."""
    return _pool([modulated_oscillations, _product], rng, n, steps)


def _exponential(systems: list[Family], rng: np.random.Generator, n: int, steps: int) -> np.ndarray:
    """Exponentials of systems, scaled at random: what a measure shows on the other side of a logarithm."""
    x = _pool(systems, rng, n, steps)
    return np.exp(log_uniform(rng, 0.3, 2.0, (n, 1, 1)) * x / np.abs(x).max(axis=(1, 2), keepdims=True))


@_family
def exponential_springs(rng: np.random.Generator, n: int, steps: int) -> np.ndarray:
    """Exponentials of pendulums and springs."""
    return _exponential([pendulum, duffing], rng, n, steps)


@_family
def exponential_systems(rng: np.random.Generator, n: int, steps: int) -> np.ndarray:
    """Exponentials of linear systems, spirals and relaxation oscillators."""
    return _exponential([linear_systems, limit_cycle_normal_form, van_der_pol], rng, n, steps)
