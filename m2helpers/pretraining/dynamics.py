"""Systems that move: what the pre-training families are made from, none of them a predator–prey system.

Each draws `n` systems at once and returns them sampled evenly: an array (n, steps, dimensions).
"""

from __future__ import annotations

import numpy as np

from ..simulator import Field, runge_kutta_slopes

SHORTEST_PERIOD, LONGEST_PERIOD = 8.0, 36.0  # samples per cycle, the range that sampling rates are drawn from


def log_uniform(rng: np.random.Generator, low: float, high: float, size: int | tuple[int, ...]) -> np.ndarray:
    """Draws whose logarithms are uniform between those of `low` and `high`."""
    return np.exp(rng.uniform(np.log(low), np.log(high), size))


def integrate(
    field: Field,
    state: np.ndarray,
    period: float | np.ndarray,
    rng: np.random.Generator,
    steps: int,
    substeps: int = 6,
) -> np.ndarray:
    """Fourth-order Runge–Kutta for many systems at once, at a sampling rate drawn for each.

    Parameters
    ----------
    field : callable
        Takes and returns (dimensions, n).
    state : (dimensions, n)
    period : float or array (n,)
        The systems' typical period in their own time, so that cycles take between 8 and 36 samples.

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
                k1, k2, k3, k4 = runge_kutta_slopes(field, state, h)
                state = state + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return path.transpose(2, 0, 1)


def phases(rng: np.random.Generator, n: int, steps: int) -> np.ndarray:
    """Phase of an oscillation in radians, (n, steps): a random period and start, sometimes slowly drifting."""
    period = log_uniform(rng, SHORTEST_PERIOD, LONGEST_PERIOD, (n, 1))
    t = np.arange(steps)
    drift = rng.choice([0, 0, 1], (n, 1)) * rng.uniform(-0.3, 0.3, (n, 1)) * t / steps
    return 2 * np.pi * (t / period * (1 + drift) + rng.random((n, 1)))


def modulated_oscillations(rng: np.random.Generator, n: int, steps: int) -> np.ndarray:
    """Sinusoids whose amplitude beats slowly."""
    phase = phases(rng, n, steps)
    beat = 1 + rng.uniform(0.2, 0.9, (n, 1)) * np.sin(phase / rng.uniform(3, 12, (n, 1)))
    return np.stack([beat * np.sin(phase), beat * np.cos(phase + rng.uniform(-1, 1, (n, 1)))], axis=-1)


def van_der_pol(rng: np.random.Generator, n: int, steps: int) -> np.ndarray:
    """Relaxation oscillator (van der Pol 1926)."""
    mu = log_uniform(rng, 0.05, 4, n)

    def field(s: np.ndarray) -> np.ndarray:
        return np.stack([s[1], mu * (1 - s[0] ** 2) * s[1] - s[0]])

    return integrate(field, rng.uniform(-2, 2, (2, n)), 6.3 + 1.6 * mu, rng, steps, 12)


def fitzhugh_nagumo(rng: np.random.Generator, n: int, steps: int) -> np.ndarray:
    """Excitable medium (FitzHugh 1961)."""
    drive, slow = rng.uniform(0.2, 1.2, n), rng.uniform(0.05, 0.25, n)

    def field(s: np.ndarray) -> np.ndarray:
        return np.stack([s[0] - s[0] ** 3 / 3 - s[1] + drive, slow * (s[0] + 0.7 - 0.8 * s[1])])

    return integrate(field, rng.uniform(-1.5, 1.5, (2, n)), 3 / slow + 10, rng, steps, 10)


def brusselator(rng: np.random.Generator, n: int, steps: int) -> np.ndarray:
    """Autocatalytic reaction (Prigogine and Lefever 1968), damped or cycling."""
    a = rng.uniform(0.7, 1.3, n)
    b = (1 + a**2) * rng.uniform(0.6, 1.6, n)

    def field(s: np.ndarray) -> np.ndarray:
        return np.stack([a + s[0] ** 2 * s[1] - (b + 1) * s[0], b * s[0] - s[0] ** 2 * s[1]])

    return integrate(field, rng.uniform(0.3, 2.5, (2, n)), 7.0, rng, steps, 12)


def pendulum(rng: np.random.Generator, n: int, steps: int) -> np.ndarray:
    """A swinging pendulum with friction."""
    friction = log_uniform(rng, 0.003, 0.2, n)
    start = np.stack([rng.uniform(0.3, 3.0, n), rng.normal(0, 0.3, n)])
    return integrate(lambda s: np.stack([s[1], -np.sin(s[0]) - friction * s[1]]), start, 7.0, rng, steps)


def duffing(rng: np.random.Generator, n: int, steps: int) -> np.ndarray:
    """A spring that hardens or has two wells (Duffing 1918), with friction."""
    linear, friction = rng.choice([-1.0, 0.2, 1.0], n), log_uniform(rng, 0.005, 0.2, n)

    def field(s: np.ndarray) -> np.ndarray:
        return np.stack([s[1], -linear * s[0] - s[0] ** 3 - friction * s[1]])

    return integrate(field, rng.uniform(-2, 2, (2, n)), 5.0, rng, steps, 8)


def anharmonic_oscillator(rng: np.random.Generator, n: int, steps: int) -> np.ndarray:
    """A weight on a spring that is stiff one way and soft the other (Toda's potential), with friction."""
    friction, start = log_uniform(rng, 0.002, 0.1, n), rng.uniform(-2.5, 1.2, n)

    def field(s: np.ndarray) -> np.ndarray:
        return np.stack([s[1], 1 - np.exp(s[0]) - friction * s[1]])

    return integrate(field, np.stack([start, rng.normal(0, 0.5, n)]), 7.5, rng, steps, 10)


def goodwin(rng: np.random.Generator, n: int, steps: int) -> np.ndarray:
    """A product that shuts off its own making two stages earlier (Goodwin 1965), damped or barely cycling."""
    power, strength = rng.uniform(3, 12, n), log_uniform(rng, 1, 20, n)
    loss = rng.uniform(0.4, 1.2, (3, n))

    def field(s: np.ndarray) -> np.ndarray:
        made = np.stack([strength / (1 + np.maximum(s[2], 0) ** power), s[0], s[1]])
        return made - loss * s

    return integrate(field, rng.uniform(0, 2.5, (3, n)), 4.5, rng, steps)


def repressilator(rng: np.random.Generator, n: int, steps: int) -> np.ndarray:
    """Three genes that repress one another in a ring (Elowitz and Leibler 2000)."""
    strength, power = log_uniform(rng, 2, 30, n), rng.uniform(1.5, 4, n)

    def field(s: np.ndarray) -> np.ndarray:
        return strength / (1 + np.maximum(np.roll(s, 1, axis=0), 0) ** power) - s

    return integrate(field, rng.uniform(0, 2, (3, n)), 4.5, rng, steps)


def gierer_meinhardt(rng: np.random.Generator, n: int, steps: int) -> np.ndarray:
    """An activator that makes itself and its inhibitor (Gierer and Meinhardt 1972), well mixed."""
    leak, loss = log_uniform(rng, 0.02, 0.3, n), rng.uniform(0.6, 1.3, n)

    def field(s: np.ndarray) -> np.ndarray:
        return np.stack([s[0] ** 2 / s[1] - s[0] + leak, loss * (s[0] ** 2 - s[1])])

    return integrate(field, rng.uniform(0.5, 1.6, (2, n)), 6.5 / np.sqrt(loss), rng, steps, 12)


def lengyel_epstein(rng: np.random.Generator, n: int, steps: int) -> np.ndarray:
    """Iodide and chlorite (Lengyel and Epstein 1991), well mixed, near the edge between rest and cycle."""
    feed = rng.uniform(8.5, 14, n)
    rest = feed / 5  # of iodide
    rate = (3 * rest - 5 / rest) * rng.uniform(0.75, 1.15, n)  # 1 is the edge

    def field(s: np.ndarray) -> np.ndarray:
        pair = s[0] * s[1] / (1 + s[0] ** 2)
        return np.stack([feed - s[0] - 4 * pair, rate * (s[0] - pair)])

    start = np.stack([rest, 1 + rest**2]) * rng.uniform(0.5, 1.7, (2, n))
    return integrate(field, start, 6.3 / np.sqrt(rate * 5 * rest / (1 + rest**2)), rng, steps, 14)


def two_species_competition(rng: np.random.Generator, n: int, steps: int) -> np.ndarray:
    """Two species that compete for the same food (never one that eats the other)."""
    pressure, speed = rng.uniform(0.3, 1.6, (2, n)), rng.uniform(0.4, 1, (2, n))

    def field(s: np.ndarray) -> np.ndarray:
        return speed * s * (1 - s - pressure * s[::-1])

    return integrate(field, rng.uniform(0.02, 1.5, (2, n)), 12.0, rng, steps)


def epidemic(rng: np.random.Generator, n: int, steps: int) -> np.ndarray:
    """Susceptible, infected, recovered, with lost immunity (SIRS)."""
    contact, waning = rng.uniform(1.3, 5, n), log_uniform(rng, 0.01, 0.3, n)

    def field(s: np.ndarray) -> np.ndarray:
        infection = contact * s[0] * s[1]
        return np.stack([waning * s[2] - infection, infection - s[1], s[1] - waning * s[2]])

    infected = log_uniform(rng, 1e-3, 0.2, n)
    start = np.stack([1 - infected, infected, np.zeros(n)])
    return integrate(field, start, 9 / np.sqrt(waning * (contact - 1)), rng, steps, 10)


def lorenz(rng: np.random.Generator, n: int, steps: int) -> np.ndarray:
    """Lorenz's convection (1963), sampled finely, chaotic or settling."""
    rho = rng.uniform(12, 40, n)

    def field(s: np.ndarray) -> np.ndarray:
        return np.stack([10 * (s[1] - s[0]), s[0] * (rho - s[2]) - s[1], s[0] * s[1] - 8 / 3 * s[2]])

    return integrate(field, rng.normal(0, 6, (3, n)) + np.array([[0], [0], [20]]), 0.75, rng, steps, 10)


def rossler(rng: np.random.Generator, n: int, steps: int) -> np.ndarray:
    """Rössler's band (1976)."""
    c = rng.uniform(2.5, 7, n)

    def field(s: np.ndarray) -> np.ndarray:
        return np.stack([-s[1] - s[2], s[0] + 0.2 * s[1], 0.2 + s[2] * (s[0] - c)])

    return integrate(field, rng.uniform(-4, 4, (3, n)) * np.array([[1], [1], [0.1]]), 6.0, rng, steps, 10)


def random_networks(rng: np.random.Generator, n: int, steps: int) -> np.ndarray:
    """Smooth random equations: eight tanh units that push a turning point about, leaking back to rest."""
    inner, outer = rng.normal(0, 1, (8, 3, n)), rng.normal(0, 0.5, (3, 8, n))
    bias, leak, turn = rng.normal(0, 0.5, (8, n)), rng.uniform(0.02, 0.3, n), rng.uniform(0.5, 1.5, n)

    def field(s: np.ndarray) -> np.ndarray:
        push = np.einsum("dkn,kn->dn", outer, np.tanh(np.einsum("kdn,dn->kn", inner, s) + bias))
        return push + turn * np.stack([s[1], -s[0], np.zeros_like(s[0])]) - leak * s

    return integrate(field, rng.normal(0, 1.5, (3, n)), 6.0, rng, steps)


def delayed_feedback(rng: np.random.Generator, n: int, steps: int) -> np.ndarray:
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


def smooth_random(rng: np.random.Generator, n: int, steps: int) -> np.ndarray:
    """Draws from a Gaussian process with a random band of frequencies (random Fourier features), three of them mixed."""
    cycles = steps / log_uniform(rng, SHORTEST_PERIOD, LONGEST_PERIOD, (n, 1, 1))
    frequency = np.abs(rng.normal(1, rng.uniform(0.1, 0.8, (n, 1, 1)), (n, 12, 1))) * cycles
    t = np.linspace(0, 2 * np.pi, steps)
    features = np.sin(frequency * t + rng.uniform(0, 2 * np.pi, (n, 12, 1)))  # (n, 12, steps)
    return np.einsum("nfs,nfd->nsd", features, rng.normal(0, 1, (n, 12, 3)))


def gaussian_process(rng: np.random.Generator, n: int, steps: int) -> np.ndarray:
    """Draws from Gaussian processes, each of two kernels of different kinds, added or multiplied."""
    t = np.arange(steps)
    apart = np.subtract.outer(t, t)  # (steps, steps)
    period, width = log_uniform(rng, SHORTEST_PERIOD, LONGEST_PERIOD, (2, n, 1, 1))
    kernels = np.stack(  # (5, n, steps, steps), all 1 on the diagonal but the last
        [
            np.exp(-((apart / width) ** 2) / 2),
            1 / (1 + (apart / width) ** 2),  # rational quadratic: many widths at once
            np.exp(-2 * np.sin(np.pi * apart / period) ** 2),
            np.cos(2 * np.pi * apart / period),
            np.broadcast_to(np.multiply.outer(t - steps / 2, t - steps / 2) / (steps / 2) ** 2, (n, steps, steps)),
        ]
    )
    first, second = rng.permuted(np.tile(np.arange(5), (n, 1)), axis=1)[:, :2].T
    one, other = kernels[first, range(n)], kernels[second, range(n)]
    both = np.where(rng.random((n, 1, 1)) < 0.5, one + other, one * other)
    root = np.linalg.cholesky(both + 1e-6 * np.eye(steps))
    return root @ rng.normal(0, 1, (n, steps, 3))


def growth_and_decay(rng: np.random.Generator, n: int, steps: int) -> np.ndarray:
    """Saturating growth, its mirror image, and relaxation with different rates."""
    t = np.arange(steps) / steps
    rate, middle = log_uniform(rng, 3, 40, (n, 1)), rng.uniform(0, 0.8, (n, 1))
    power = log_uniform(rng, 0.3, 3, (n, 1))
    logistic = (1 + np.exp(-rate * (t - middle))) ** -power
    return np.stack([logistic, np.exp(-rate * t / 3), t**power], axis=-1)


def noise_with_memory(rng: np.random.Generator, n: int, steps: int) -> np.ndarray:
    """Autoregressive noise of order two, and its running sum that forgets (Ornstein–Uhlenbeck)."""
    radius, angle = rng.uniform(0.6, 0.985, n), 2 * np.pi / log_uniform(rng, SHORTEST_PERIOD, LONGEST_PERIOD, n)
    a, b, memory = 2 * radius * np.cos(angle), -(radius**2), rng.uniform(0.7, 0.98, n)
    shocks = rng.normal(0, 1, (steps, n))
    path = np.zeros((steps + 2, 2, n))
    for i in range(steps):
        path[i + 2, 0] = a * path[i + 1, 0] + b * path[i, 0] + shocks[i]
        path[i + 2, 1] = memory * path[i + 1, 1] + path[i + 2, 0]
    return path[2:].transpose(2, 0, 1)


def trend_and_season(rng: np.random.Generator, n: int, steps: int) -> np.ndarray:
    """A line, a repeated pattern of random shape, and a little noise."""
    period = rng.integers(4, 40, (n, 1))
    shape = rng.normal(0, 1, (n, 40)) * rng.choice([0.3, 1], (n, 1)) + np.sin(2 * np.pi * np.arange(40) / period)
    season = np.take_along_axis(shape, np.arange(steps) % period, axis=1)
    trend = rng.normal(0, 2, (n, 1)) * np.linspace(0, 1, steps)
    return np.stack([season + trend, np.roll(season, 2, axis=1) - rng.normal(0, 1, (n, 1)) * trend], axis=-1)


def steps_and_spikes(rng: np.random.Generator, n: int, steps: int) -> np.ndarray:
    """Levels that jump at random, and spikes that repeat and fade."""
    jumps = rng.random((n, steps)) < rng.uniform(0.01, 0.08, (n, 1))
    level = np.cumsum(jumps * rng.normal(0, 1, (n, steps)), axis=1)
    since = np.arange(steps) % rng.integers(5, 50, (n, 1))
    return np.stack([level, np.exp(-since * log_uniform(rng, 0.05, 1, (n, 1)))], axis=-1)
