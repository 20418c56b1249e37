"""Forecasts that cost nothing and are not easily beaten: the last season again, and what followed the nearest past motif.

Functions ``(context (n, v), steps) -> (steps, v)``, as those of `baselines` but for the time between two steps.
"""

from __future__ import annotations

import numpy as np

_SEASONAL = 0.2  # autocorrelation under which there is no season to repeat
_MOTIF = 10  # steps compared


def season_length(context: np.ndarray) -> int:
    """Steps of the strongest period: where the autocorrelation, mean over variables, is highest after its first dip; 1 if none."""
    n, centred = len(context), context - context.mean(axis=0)
    variance = (centred**2).sum(axis=0)
    moving = centred[:, variance > 0] / np.sqrt(variance[variance > 0])
    lags = np.arange(n // 2 + 1)
    if not moving.size or len(lags) < 3:
        return 1
    correlation = np.array([(moving[: n - lag] * moving[lag:]).sum(axis=0).mean() * n / (n - lag) for lag in lags])
    rising = np.flatnonzero(np.diff(correlation) > 0)
    if not len(rising):
        return 1
    best = int(rising[0] + correlation[rising[0] :].argmax())
    return best if correlation[best] > _SEASONAL else 1


def seasonal_naive(context: np.ndarray, steps: int) -> np.ndarray:
    """Repeat the last season, of the length that `season_length` finds."""
    season = season_length(context)
    return context[len(context) - season + np.arange(steps) % season]


def parrot(context: np.ndarray, steps: int) -> np.ndarray:
    """Copy what followed the past motif that is nearest to the last steps, all variables together, each in its own spread.

    Source: Zhang and Gilpin, "Context parroting: a simple but tough-to-beat baseline for foundation models in scientific
    machine learning", 2025.
    """
    n, motif = len(context), min(_MOTIF, len(context) // 3)
    if motif < 1:
        return np.repeat(context[-1:], steps, axis=0)
    spread = context.std(axis=0)
    scaled = (context - context.mean(axis=0)) / np.where(spread > 0, spread, 1)
    windows = np.lib.stride_tricks.sliding_window_view(scaled, motif, axis=0)  # (n − motif + 1, v, motif)
    # The motif may not overlap the last steps: of a smooth series, those one step earlier are always nearest.
    nearest = int(((windows[:-motif] - windows[-1]) ** 2).sum(axis=(1, 2)).argmin())
    path = list(context)
    for step in range(steps):
        path.append(path[nearest + motif + step])  # past the end it copies what it has copied
    return np.array(path[n:])
