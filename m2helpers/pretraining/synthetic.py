"""Synthetic series for pre-training: an equal mixture of the families of dynamics.

`draw_series` dresses what a family draws as measured data: some of its variables, at a random scale and offset, sometimes
with noise. Everything is a function of a seed, so the stream needs no storage and a stopped run picks it up where it was.
"""

from __future__ import annotations

import numpy as np

from ..text import Codec
from .dynamics import log_uniform
from .families import FAMILIES

STILL = 0.1  # of its whole range: a series that moves less than this in its second half has come to rest
STILL_SHARE = 0.15  # of the series at rest, kept all the same while others can be had
SHORTER = 0.03  # of the texts: a batch is padded to its longest, so more of them would waste time


def draw_series(rng: np.random.Generator, n: int, steps: int, family: str) -> list[np.ndarray]:
    """Draw `n` series of one family, dressed as measurements: each (steps, 1 to 3 variables), below 1,000 in size.

    Twice as many are drawn, and most of those that have come to rest halfway make room for others: their text teaches little.
    """
    raw = FAMILIES[family](rng, 2 * n + 2, steps)  # (more than n, steps, dimensions)
    ranges = np.ptp(raw, axis=1)  # (more than n, dimensions)
    sound = np.isfinite(raw).all(axis=(1, 2)) & (np.abs(raw) < 1e6).all(axis=(1, 2)) & (ranges > 1e-6).all(axis=1)
    if not sound.any():
        raise RuntimeError(f"family {family}: every system drawn blew up or stood still")
    raw, ranges = raw[sound], ranges[sound]
    moving = (np.ptp(raw[:, steps // 2 :], axis=1) > STILL * ranges).any(axis=1) | (rng.random(len(raw)) < STILL_SHARE)
    raw = raw[np.argsort(~moving, kind="stable")]
    return [_dress(rng, raw[i % len(raw)]) for i in range(n)]


def _dress(rng: np.random.Generator, x: np.ndarray) -> np.ndarray:
    """Choose variables, and give each a level, a scale and perhaps noise."""
    n_variables = rng.choice([1, 2, 3], p=[0.06, 0.88, 0.06])
    x = (x - x.min(axis=0)) / np.ptp(x, axis=0)  # (steps, dimensions), each in 0…1
    columns = [x[:, i] for i in rng.permutation(x.shape[1])]
    while len(columns) < n_variables or rng.random() < 0.07:  # a mixture as a further variable
        columns.insert(0, np.clip(x @ rng.dirichlet(np.ones(x.shape[1])), 0, 1))
    y = np.stack([c if rng.random() < 0.95 else 1 - c for c in columns[:n_variables]], axis=1)  # (steps, variables)
    low = rng.choice([0, 0.02, 0.1, 0.5], (1, n_variables))  # how far lows stay off zero, at most
    y = y + low * rng.random((1, n_variables))
    if rng.random() < 0.07:
        y = y - rng.random((1, n_variables))  # negative values too
    if rng.random() < 0.02:
        y = y + log_uniform(rng, 0.002, 0.05, 1) * rng.normal(0, 1, y.shape)
    scale = log_uniform(rng, 1.2, 16, 1) * log_uniform(rng, 0.15, 1.5, n_variables) ** rng.choice([0, 1])
    return np.clip(y * scale, -999, 999)


def draw_texts(
    seed: list[int], n: int, length: int, family: str | None = None, precision: int | None = None
) -> list[str]:
    """Draw `n` texts of at most `length` characters: the same number from each family, or all from one, shuffled.

    Half begin where their series does, half anywhere, even inside a number; a few are shorter.

    Parameters
    ----------
    seed : list of int
        Anything `numpy.random.default_rng` takes; the same seed draws the same texts.
    precision : int, optional
        Decimals; by default mostly 2, sometimes 0, 1 or 3.
    """
    rng = np.random.default_rng(seed)
    families = [family] if family else list(FAMILIES)
    share = -(-n // len(families))
    steps = length // 5 + 20  # a one-variable series at precision 2 takes 5 characters a step
    series = [s for name in families for s in draw_series(rng, share, steps, name)]
    texts = []
    for index in rng.permutation(len(series))[:n]:
        decimals = rng.choice([0, 1, 2, 3], p=[0.02, 0.03, 0.91, 0.04]) if precision is None else precision
        text = Codec(1.0, int(decimals)).encode(series[index])
        start = rng.integers(0, max(1, len(text) - length)) * rng.integers(0, 2)
        stop = start + (rng.integers(max(1, length // 8), length) if rng.random() < SHORTER else length)
        texts.append(text[start:stop])
    return texts
