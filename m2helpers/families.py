"""Families of dynamics for pre-training, none of them a predator–prey system.

Each draws `n` systems at once and returns them sampled evenly: an array (n, steps, dimensions).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Family = Callable[[np.random.Generator, int, int], np.ndarray]

FAMILIES: dict[str, Family] = {}
SHORTEST_PERIOD, LONGEST_PERIOD = 6.0, 50.0  # samples per cycle, the range that sampling rates are drawn from


def _family(function: Family) -> Family:
    FAMILIES[function.__name__] = function
    return function


def log_uniform(rng: np.random.Generator, low: float, high: float, size) -> np.ndarray:
    """Draws whose logarithms are uniform between those of `low` and `high`."""
    return np.exp(rng.uniform(np.log(low), np.log(high), size))


def _integrate(field, state: np.ndarray, period, rng: np.random.Generator, steps: int, substeps: int = 6) -> np.ndarray:
    """Fourth-order Runge–Kutta for many systems at once, at a sampling rate drawn for each.

    Parameters
    ----------
    field : callable
        Takes and returns (dimensions, n).
    state : (dimensions, n)
    period : float or array (n,)
        The systems' typical period in their own time, so that cycles take between 6 and 50 samples.

    Returns
    -------
    (n, steps, dimensions)
    """
    h = np.asarray(period) / log_uniform(rng, SHORTEST_PERIOD, LONGEST_PERIOD, state.shape[1]) / substeps  # (n,)
    path = np.empty((steps, *state.shape))  # (steps, dimensions, n)
    with np.errstate(all="ignore"):  # a system that blows up is dropped by draw_series
        for step in range(steps):
            path[step] = state
            for _ in range(substeps):
                k1 = field(state)
                k2 = field(state + h / 2 * k1)
                k3 = field(state + h / 2 * k2)
                k4 = field(state + h * k3)
                state = state + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return path.transpose(2, 0, 1)


def _pool(systems: list[Family], rng: np.random.Generator, n: int, steps: int) -> np.ndarray:
    """Two variables of each of several systems, in equal shares: (n, steps, 2)."""
    share = -(-n // len(systems))
    return rng.permutation(np.concatenate([system(rng, share, steps)[:, :, :2] for system in systems]))[:n]


def _phase(rng: np.random.Generator, n: int, steps: int) -> np.ndarray:
    """Phase of an oscillation in radians, (n, steps): a random period and start, sometimes slowly drifting."""
    period = log_uniform(rng, SHORTEST_PERIOD, LONGEST_PERIOD, (n, 1))
    t = np.arange(steps)
    drift = rng.choice([0, 0, 1], (n, 1)) * rng.uniform(-0.3, 0.3, (n, 1)) * t / steps
    return 2 * np.pi * (t / period * (1 + drift) + rng.random((n, 1)))


@_family
def damped_oscillations(rng, n, steps):
    """Two sinusoids of one period, apart in phase, that die away (or, rarely, grow), with a harmonic."""
    phase = _phase(rng, n, steps)
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
def modulated_oscillations(rng, n, steps):
    """Sinusoids whose amplitude beats slowly."""
    phase = _phase(rng, n, steps)
    beat = 1 + rng.uniform(0.2, 0.9, (n, 1)) * np.sin(phase / rng.uniform(3, 12, (n, 1)))
    return np.stack([beat * np.sin(phase), beat * np.cos(phase + rng.uniform(-1, 1, (n, 1)))], axis=-1)


@_family
def linear_systems(rng, n, steps):
    """Three coupled linear equations, every mode damped or neutral."""
    matrix = rng.normal(0, 0.5, (3, 3, n))
    matrix = matrix - matrix.transpose(1, 0, 2) * rng.uniform(0.2, 1, n)  # mostly rotation
    growth = np.linalg.eigvals(matrix.transpose(2, 0, 1)).real.max(axis=1)
    matrix -= np.eye(3)[:, :, None] * (growth + log_uniform(rng, 0.003, 0.1, n))
    return _integrate(lambda s: np.einsum("ijn,jn->in", matrix, s), rng.normal(0, 1, (3, n)), 6.0, rng, steps)


@_family
def van_der_pol(rng, n, steps):
    """Relaxation oscillator (van der Pol 1926)."""
    mu = log_uniform(rng, 0.05, 4, n)
    field = lambda s: np.stack([s[1], mu * (1 - s[0] ** 2) * s[1] - s[0]])  # noqa: E731
    return _integrate(field, rng.uniform(-2, 2, (2, n)), 6.3 + 1.6 * mu, rng, steps, 12)


@_family
def fitzhugh_nagumo(rng, n, steps):
    """Excitable medium (FitzHugh 1961)."""
    drive, slow = rng.uniform(0.2, 1.2, n), rng.uniform(0.05, 0.25, n)
    field = lambda s: np.stack([s[0] - s[0] ** 3 / 3 - s[1] + drive, slow * (s[0] + 0.7 - 0.8 * s[1])])  # noqa: E731
    return _integrate(field, rng.uniform(-1.5, 1.5, (2, n)), 3 / slow + 10, rng, steps, 10)


@_family
def brusselator(rng, n, steps):
    """Autocatalytic reaction (Prigogine and Lefever 1968), damped or cycling."""
    a = rng.uniform(0.7, 1.3, n)
    b = (1 + a**2) * rng.uniform(0.6, 1.6, n)
    field = lambda s: np.stack([a + s[0] ** 2 * s[1] - (b + 1) * s[0], b * s[0] - s[0] ** 2 * s[1]])  # noqa: E731
    return _integrate(field, rng.uniform(0.3, 2.5, (2, n)), 7.0, rng, steps, 12)


@_family
def glycolysis(rng, n, steps):
    """Sel'kov's model of glycolysis (1968), damped or cycling."""
    a, b = rng.uniform(0.04, 0.14, n), rng.uniform(0.35, 0.9, n)
    field = lambda s: np.stack([-s[0] + a * s[1] + s[0] ** 2 * s[1], b - a * s[1] - s[0] ** 2 * s[1]])  # noqa: E731
    return _integrate(field, rng.uniform(0.3, 2, (2, n)), 8.0, rng, steps, 10)


@_family
def pendulum(rng, n, steps):
    """A swinging pendulum with friction."""
    friction = log_uniform(rng, 0.003, 0.2, n)
    start = np.stack([rng.uniform(0.3, 3.0, n), rng.normal(0, 0.3, n)])
    return _integrate(lambda s: np.stack([s[1], -np.sin(s[0]) - friction * s[1]]), start, 7.0, rng, steps)


@_family
def duffing(rng, n, steps):
    """A spring that hardens or has two wells (Duffing 1918), with friction."""
    linear, friction = rng.choice([-1.0, 0.2, 1.0], n), log_uniform(rng, 0.005, 0.2, n)
    field = lambda s: np.stack([s[1], -linear * s[0] - s[0] ** 3 - friction * s[1]])  # noqa: E731
    return _integrate(field, rng.uniform(-2, 2, (2, n)), 5.0, rng, steps, 8)


@_family
def anharmonic_oscillator(rng, n, steps):
    """A weight on a spring that is stiff one way and soft the other (Toda's potential), with friction."""
    friction, start = log_uniform(rng, 0.002, 0.1, n), rng.uniform(-2.5, 1.2, n)
    field = lambda s: np.stack([s[1], 1 - np.exp(s[0]) - friction * s[1]])  # noqa: E731
    return _integrate(field, np.stack([start, rng.normal(0, 0.5, n)]), 7.5, rng, steps, 10)


@_family
def limit_cycle_normal_form(rng, n, steps):
    """Stuart–Landau oscillator: a spiral on to a circle, or into a point."""
    growth, twist = rng.uniform(-0.15, 0.3, n), rng.uniform(-0.8, 0.8, n)

    def field(s):
        square = (s**2).sum(0)
        real, imaginary = growth - square, 1 - twist * square
        return np.stack([real * s[0] - imaginary * s[1], imaginary * s[0] + real * s[1]])

    return _integrate(field, rng.uniform(-1, 1, (2, n)), 6.3, rng, steps)


@_family
def random_networks(rng, n, steps):
    """Smooth random equations: eight tanh units that push a turning point about, leaking back to rest."""
    inner, outer = rng.normal(0, 1, (8, 3, n)), rng.normal(0, 0.5, (3, 8, n))
    bias, leak, turn = rng.normal(0, 0.5, (8, n)), rng.uniform(0.1, 0.6, n), rng.uniform(0.5, 1.5, n)

    def field(s):
        push = np.einsum("dkn,kn->dn", outer, np.tanh(np.einsum("kdn,dn->kn", inner, s) + bias))
        return push + turn * np.stack([s[1], -s[0], np.zeros_like(s[0])]) - leak * s

    return _integrate(field, rng.normal(0, 1.5, (3, n)), 6.0, rng, steps)


@_family
def schnakenberg(rng, n, steps):
    """Autocatalysis fed from both sides (Schnakenberg 1979), damped or cycling."""
    a, b = rng.uniform(0.02, 0.2, n), rng.uniform(0.4, 1.2, n)
    field = lambda s: np.stack([a - s[0] + s[0] ** 2 * s[1], b - s[0] ** 2 * s[1]])  # noqa: E731
    return _integrate(field, rng.uniform(0.2, 2, (2, n)), 7.0, rng, steps, 10)


@_family
def repressilator(rng, n, steps):
    """Three genes that repress one another in a ring (Elowitz and Leibler 2000)."""
    strength, power = log_uniform(rng, 2, 30, n), rng.uniform(1.5, 4, n)
    field = lambda s: strength / (1 + np.maximum(np.roll(s, 1, axis=0), 0) ** power) - s  # noqa: E731
    return _integrate(field, rng.uniform(0, 2, (3, n)), 4.5, rng, steps)


def _two_species_competition(rng, n, steps):
    """Two species that compete for the same food (never one that eats the other)."""
    pressure, speed = rng.uniform(0.3, 1.6, (2, n)), rng.uniform(0.4, 1, (2, n))
    field = lambda s: speed * s * (1 - s - pressure * s[::-1])  # noqa: E731
    return _integrate(field, rng.uniform(0.02, 1.5, (2, n)), 12.0, rng, steps)


def _epidemic(rng, n, steps):
    """Susceptible, infected, recovered, with lost immunity (SIRS)."""
    contact, waning = rng.uniform(1.3, 5, n), log_uniform(rng, 0.01, 0.3, n)

    def field(s):
        infection = contact * s[0] * s[1]
        return np.stack([waning * s[2] - infection, infection - s[1], s[1] - waning * s[2]])

    infected = log_uniform(rng, 1e-3, 0.2, n)
    start = np.stack([1 - infected, infected, np.zeros(n)])
    return _integrate(field, start, 9 / np.sqrt(waning * (contact - 1)), rng, steps, 10)


def _lorenz(rng, n, steps):
    """Lorenz's convection (1963), sampled finely, chaotic or settling."""
    rho = rng.uniform(12, 40, n)
    field = lambda s: np.stack([10 * (s[1] - s[0]), s[0] * (rho - s[2]) - s[1], s[0] * s[1] - 8 / 3 * s[2]])  # noqa: E731
    return _integrate(field, rng.normal(0, 6, (3, n)) + np.array([[0], [0], [20]]), 0.75, rng, steps, 10)


def _rossler(rng, n, steps):
    """Rössler's band (1976)."""
    c = rng.uniform(2.5, 7, n)
    field = lambda s: np.stack([-s[1] - s[2], s[0] + 0.2 * s[1], 0.2 + s[2] * (s[0] - c)])  # noqa: E731
    return _integrate(field, rng.uniform(-4, 4, (3, n)) * np.array([[1], [1], [0.1]]), 6.0, rng, steps, 10)


def _delayed_feedback(rng, n, steps):
    """Mackey–Glass blood cells (1977): one variable that answers to its own past, seen now and some samples ago."""
    delay, substeps = 17, 5
    power, gain = rng.uniform(5, 11, n), rng.uniform(0.15, 0.3, n)
    stretch = log_uniform(rng, 0.3, 2.5, n)  # time units per sample
    total = int(np.ceil(steps * stretch.max())) + 2 * delay
    fine = np.empty((total * substeps, n))
    fine[: delay * substeps] = rng.uniform(0.4, 1.4, n)
    for i in range(delay * substeps, len(fine)):
        past = fine[i - delay * substeps]
        fine[i] = fine[i - 1] + (gain * past / (1 + past**power) - 0.1 * fine[i - 1]) / substeps
    index = ((delay + np.arange(steps)[:, None] * stretch) * substeps).astype(int)  # (steps, n)
    now, before = (np.take_along_axis(fine, index - back, axis=0) for back in (0, 6 * substeps))
    return np.stack([now, before], axis=-1).transpose(1, 0, 2)


def _smooth_random(rng, n, steps):
    """Draws from a Gaussian process with a random band of frequencies (random Fourier features), three of them mixed."""
    cycles = steps / log_uniform(rng, SHORTEST_PERIOD, LONGEST_PERIOD, (n, 1, 1))
    frequency = np.abs(rng.normal(1, rng.uniform(0.1, 0.8, (n, 1, 1)), (n, 12, 1))) * cycles
    t = np.linspace(0, 2 * np.pi, steps)
    features = np.sin(frequency * t + rng.uniform(0, 2 * np.pi, (n, 12, 1)))  # (n, 12, steps)
    return np.einsum("nfs,nfd->nsd", features, rng.normal(0, 1, (n, 12, 3)))


@_family
def chaotic_flows(rng, n, steps):
    """Lorenz's convection, Rössler's band, and feedback that comes late."""
    return _pool([_lorenz, _rossler, _delayed_feedback], rng, n, steps)


def _growth_and_decay(rng, n, steps):
    """Saturating growth, its mirror image, and relaxation with different rates."""
    t = np.arange(steps) / steps
    rate, middle = log_uniform(rng, 3, 40, (n, 1)), rng.uniform(0, 0.8, (n, 1))
    power = log_uniform(rng, 0.3, 3, (n, 1))
    logistic = (1 + np.exp(-rate * (t - middle))) ** -power
    return np.stack([logistic, np.exp(-rate * t / 3), t**power], axis=-1)


def _noise_with_memory(rng, n, steps):
    """Autoregressive noise of order two, and its running sum that forgets (Ornstein–Uhlenbeck)."""
    radius, angle = rng.uniform(0.6, 0.985, n), 2 * np.pi / log_uniform(rng, SHORTEST_PERIOD, LONGEST_PERIOD, n)
    a, b, memory = 2 * radius * np.cos(angle), -(radius**2), rng.uniform(0.7, 0.98, n)
    shocks = rng.normal(0, 1, (steps, n))
    path = np.zeros((steps + 2, 2, n))
    for i in range(steps):
        path[i + 2, 0] = a * path[i + 1, 0] + b * path[i, 0] + shocks[i]
        path[i + 2, 1] = memory * path[i + 1, 1] + path[i + 2, 0]
    return path[2:].transpose(2, 0, 1)


@_family
def random_processes(rng, n, steps):
    """Gaussian processes and autoregressive noise: what no equation foretells."""
    return _pool([_smooth_random, _noise_with_memory], rng, n, steps)


def _trend_and_season(rng, n, steps):
    """A line, a repeated pattern of random shape, and a little noise."""
    period = rng.integers(4, 40, (n, 1))
    shape = rng.normal(0, 1, (n, 40)) * rng.choice([0.3, 1], (n, 1)) + np.sin(2 * np.pi * np.arange(40) / period)
    season = np.take_along_axis(shape, np.arange(steps) % period, axis=1)
    trend = rng.normal(0, 2, (n, 1)) * np.linspace(0, 1, steps)
    return np.stack([season + trend, np.roll(season, 2, axis=1) - rng.normal(0, 1, (n, 1)) * trend], axis=-1)


def _steps_and_spikes(rng, n, steps):
    """Levels that jump at random, and spikes that repeat and fade."""
    jumps = rng.random((n, steps)) < rng.uniform(0.01, 0.08, (n, 1))
    level = np.cumsum(jumps * rng.normal(0, 1, (n, steps)), axis=1)
    since = np.arange(steps) % rng.integers(5, 50, (n, 1))
    return np.stack([level, np.exp(-since * log_uniform(rng, 0.05, 1, (n, 1)))], axis=-1)


@_family
def transients(rng, n, steps):
    """Ways to a rest: growth and decay, two species in competition, epidemics."""
    return _pool([_growth_and_decay, _two_species_competition, _epidemic], rng, n, steps)


@_family
def trends_and_steps(rng, n, steps):
    """Trends with seasons, steps and spikes."""
    return _pool([_trend_and_season, _steps_and_spikes], rng, n, steps)


@_family
def products(rng, n, steps):
    """The product of two other families' variables, term by term."""
    first, second = damped_oscillations(rng, n, steps), _smooth_random(rng, n, steps)[:, :, :2]
    scale = np.abs(second).max(axis=(1, 2), keepdims=True)
    return first * (1.2 + second / scale)


@_family
def exponential_systems(rng, n, steps):
    """Exponentials of mechanical systems: what a measure shows on the other side of a logarithm."""
    x = _pool([pendulum, duffing, van_der_pol, linear_systems], rng, n, steps)
    return np.exp(log_uniform(rng, 0.3, 2.0, (n, 1, 1)) * x / np.abs(x).max(axis=(1, 2), keepdims=True))
