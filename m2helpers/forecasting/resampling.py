"""Fewer paths for many, with weights that keep every expectation. No torch."""

from __future__ import annotations

import numpy as np


def resample(weights: np.ndarray, n: int, uniform: float) -> tuple[np.ndarray, np.ndarray]:
    """Choose at most `n` of many weighted paths: which, rising, and their new weights, of the same sum.

    Those that weigh more than a threshold stay as they are; of the others some are chosen by systematic sampling in the order given
    and weigh as much as the threshold. The expectation of each new weight is the old one, and no such choice of `n` is nearer.

    Source: Fearnhead and Clifford, "On-line inference for hidden Markov models via particle filters", 2003, section 3.

    Parameters
    ----------
    weights : (paths,)
        Positive.
    uniform : float
        In [0, 1): the one random number of systematic sampling.
    """
    if len(weights) <= n:
        return np.arange(len(weights)), weights
    falling = np.sort(weights)[::-1]
    rest = falling[::-1].cumsum()[::-1]  # of each and all lighter ones
    heavy = int(np.argmax(falling[:n] * (n - np.arange(n)) <= rest[:n]))  # so many stay as they are
    threshold = rest[heavy] / (n - heavy)
    order = np.argsort(-weights, kind="stable")[:heavy]
    light = np.ones(len(weights), dtype=bool)
    light[order] = False
    places = np.floor(np.where(light, weights, 0).cumsum() / threshold + uniform)
    kept = ~light | (np.diff(places, prepend=0.0) > 0)
    return np.flatnonzero(kept), np.where(light, threshold, weights)[kept]
