"""Families of dynamics for pre-training, none of them a predator–prey system.

Each draws `n` systems at once and returns them sampled evenly: an array (n, steps, dimensions).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .dynamics import (
    delayed_feedback,
    duffing,
    epidemic,
    fitzhugh_nagumo,
    gaussian_process,
    growth_and_decay,
    integrate,
    log_uniform,
    lorenz,
    modulated_oscillations,
    noise_with_memory,
    pendulum,
    phases,
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
def damped_oscillations(rng, n, steps):
    """Two sinusoids of one period, apart in phase, that die away (or, rarely, grow), with a harmonic."""
    phase = phases(rng, n, steps)
    rate = -rng.choice([0, 1, 1, 1, -0.2], (n, 1)) * log_uniform(rng, 0.003, 0.04, (n, 1))
    envelope = np.exp(rate * np.arange(steps))
    lag, harmonic = rng.uniform(0.3, 2.8, (n, 1)), rng.uniform(0, 0.4, (n, 1))
    waves = [envelope * (np.sin(p) + harmonic * envelope * np.sin(2 * p)) for p in (phase, phase - lag)]
    return np.stack(waves, axis=-1)


@_family
def exponential_oscillations(rng, n, steps):
    """Exponentials of damped oscillations: sharp peaks, long low stretches."""
    return np.exp(log_uniform(rng, 0.3, 2.5, (n, 1, 1)) * damped_oscillations(rng, n, steps))


@_family
def linear_systems(rng, n, steps):
    """Three coupled linear equations, every mode damped or neutral."""
    matrix = rng.normal(0, 0.5, (3, 3, n))
    matrix = matrix - matrix.transpose(1, 0, 2) * rng.uniform(0.2, 1, n)  # mostly rotation
    growth = np.linalg.eigvals(matrix.transpose(2, 0, 1)).real.max(axis=1)
    matrix -= np.eye(3)[:, :, None] * (growth + log_uniform(rng, 0.003, 0.1, n))
    return integrate(lambda s: np.einsum("ijn,jn->in", matrix, s), rng.normal(0, 1, (3, n)), 6.0, rng, steps)


@_family
def relaxation_oscillators(rng, n, steps):
    """Slow creep and sudden jumps: a triode, a nerve."""
    return _pool([van_der_pol, fitzhugh_nagumo], rng, n, steps)


@_family
def brusselator(rng, n, steps):
    """Autocatalytic reaction (Prigogine and Lefever 1968), damped or cycling."""
    a = rng.uniform(0.7, 1.3, n)
    b = (1 + a**2) * rng.uniform(0.6, 1.6, n)
    field = lambda s: np.stack([a + s[0] ** 2 * s[1] - (b + 1) * s[0], b * s[0] - s[0] ** 2 * s[1]])  # noqa: E731
    return integrate(field, rng.uniform(0.3, 2.5, (2, n)), 7.0, rng, steps, 12)


@_family
def glycolysis(rng, n, steps):
    """Sel'kov's model of glycolysis (1968), damped or cycling."""
    a, b = rng.uniform(0.04, 0.14, n), rng.uniform(0.35, 0.9, n)
    field = lambda s: np.stack([-s[0] + a * s[1] + s[0] ** 2 * s[1], b - a * s[1] - s[0] ** 2 * s[1]])  # noqa: E731
    return integrate(field, rng.uniform(0.3, 2, (2, n)), 8.0, rng, steps, 10)


@_family
def pendulums_and_springs(rng, n, steps):
    """Mechanical oscillators with a restoring force that is not linear."""
    return _pool([pendulum, duffing], rng, n, steps)


@_family
def anharmonic_oscillator(rng, n, steps):
    """A weight on a spring that is stiff one way and soft the other (Toda's potential), with friction."""
    friction, start = log_uniform(rng, 0.002, 0.1, n), rng.uniform(-2.5, 1.2, n)
    field = lambda s: np.stack([s[1], 1 - np.exp(s[0]) - friction * s[1]])  # noqa: E731
    return integrate(field, np.stack([start, rng.normal(0, 0.5, n)]), 7.5, rng, steps, 10)


@_family
def limit_cycle_normal_form(rng, n, steps):
    """Stuart–Landau oscillator: a spiral on to a circle, or into a point."""
    growth, twist = rng.uniform(-0.15, 0.3, n), rng.uniform(-0.8, 0.8, n)

    def field(s):
        square = (s**2).sum(0)
        real, imaginary = growth - square, 1 - twist * square
        return np.stack([real * s[0] - imaginary * s[1], imaginary * s[0] + real * s[1]])

    return integrate(field, rng.uniform(-1, 1, (2, n)), 6.3, rng, steps)


@_family
def negative_feedback(rng, n, steps):
    """A product that shuts off its own making two stages earlier (Goodwin 1965), damped or barely cycling."""
    power, strength = rng.uniform(3, 12, n), log_uniform(rng, 1, 20, n)
    loss = rng.uniform(0.4, 1.2, (3, n))

    def field(s):
        made = np.stack([strength / (1 + np.maximum(s[2], 0) ** power), s[0], s[1]])
        return made - loss * s

    return integrate(field, rng.uniform(0, 2.5, (3, n)), 4.5, rng, steps)


@_family
def thermokinetics(rng, n, steps):
    """A fuel fed in evenly that burns faster the hotter it gets (Salnikov 1949), damped or cycling."""
    heat = rng.uniform(1.05, 1.5, n)  # temperature at rest
    feed = (heat - 1 + rng.uniform(-0.01, 0.12, n)) / np.exp(heat)  # near the edge between rest and cycle
    field = lambda s: np.stack([feed * (heat - s[0] * np.exp(s[1])), s[0] * np.exp(s[1]) - s[1]])  # noqa: E731
    start = np.stack([heat * np.exp(-heat) * rng.uniform(0.4, 1.8, n), heat * rng.uniform(0.4, 1.6, n)])
    return integrate(field, start, 6.3 / np.sqrt(feed * np.exp(heat)), rng, steps, 12)


@_family
def random_networks(rng, n, steps):
    """Smooth random equations: eight tanh units that push a turning point about, leaking back to rest."""
    inner, outer = rng.normal(0, 1, (8, 3, n)), rng.normal(0, 0.5, (3, 8, n))
    bias, leak, turn = rng.normal(0, 0.5, (8, n)), rng.uniform(0.02, 0.3, n), rng.uniform(0.5, 1.5, n)

    def field(s):
        push = np.einsum("dkn,kn->dn", outer, np.tanh(np.einsum("kdn,dn->kn", inner, s) + bias))
        return push + turn * np.stack([s[1], -s[0], np.zeros_like(s[0])]) - leak * s

    return integrate(field, rng.normal(0, 1.5, (3, n)), 6.0, rng, steps)


@_family
def schnakenberg(rng, n, steps):
    """Autocatalysis fed from both sides (Schnakenberg 1979), damped or cycling."""
    a, b = rng.uniform(0.02, 0.2, n), rng.uniform(0.4, 1.2, n)
    field = lambda s: np.stack([a - s[0] + s[0] ** 2 * s[1], b - s[0] ** 2 * s[1]])  # noqa: E731
    return integrate(field, rng.uniform(0.2, 2, (2, n)), 7.0, rng, steps, 10)


@_family
def repressilator(rng, n, steps):
    """Three genes that repress one another in a ring (Elowitz and Leibler 2000)."""
    strength, power = log_uniform(rng, 2, 30, n), rng.uniform(1.5, 4, n)
    field = lambda s: strength / (1 + np.maximum(np.roll(s, 1, axis=0), 0) ** power) - s  # noqa: E731
    return integrate(field, rng.uniform(0, 2, (3, n)), 4.5, rng, steps)


@_family
def chaotic_flows(rng, n, steps):
    """Lorenz's convection, Rössler's band, and feedback that comes late."""
    return _pool([lorenz, rossler, delayed_feedback], rng, n, steps)


@_family
def transients(rng, n, steps):
    """Ways to a rest: growth and decay, two species in competition, epidemics."""
    return _pool([growth_and_decay, two_species_competition, epidemic], rng, n, steps)


@_family
def random_processes(rng, n, steps):
    """What no equation foretells: Gaussian processes, autoregressive noise, trends with seasons, steps and spikes."""
    return _pool([gaussian_process, noise_with_memory, trend_and_season, steps_and_spikes], rng, n, steps)


def _product(rng, n, steps):
    """The product of two other families' variables, term by term."""
    first, second = damped_oscillations(rng, n, steps), smooth_random(rng, n, steps)[:, :, :2]
    scale = np.abs(second).max(axis=(1, 2), keepdims=True)
    return first * (1.2 + second / scale)


@_family
def products(rng, n, steps):
    """Oscillations whose amplitude changes: with a slow beat, or as a smooth random series does."""
    return _pool([modulated_oscillations, _product], rng, n, steps)


@_family
def exponential_systems(rng, n, steps):
    """Exponentials of mechanical systems: what a measure shows on the other side of a logarithm."""
    x = _pool([pendulum, duffing, van_der_pol, limit_cycle_normal_form, linear_systems], rng, n, steps)
    return np.exp(log_uniform(rng, 0.3, 2.0, (n, 1, 1)) * x / np.abs(x).max(axis=(1, 2), keepdims=True))
