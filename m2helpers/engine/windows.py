"""The windows of text that fine-tuning reads: which one stands at which place is a function of the seed and the place alone."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from transformers import PreTrainedTokenizerBase

from ..settings import TrainSettings
from ..simulator import Law
from ..simulator.draws import solve
from ..text import Codec, tokenise, windows

_BLOCK = 64  # systems drawn and solved together


def text_windows(
    trajectories: np.ndarray, codec: Codec, tokenizer: PreTrainedTokenizerBase, length: int
) -> list[np.ndarray]:
    """Token ids of consecutive windows of series (n_series, n_steps, n_variables), the last of each as short as it must be.

    One of a single token predicts nothing, and is left out.
    """
    series = tokenise([codec.encode(values) for values in trajectories], tokenizer)
    return [ids[start:stop] for ids in series for start, stop in windows(len(ids), length, length) if stop - start > 1]


def pick(seed: int, place: int, n: int) -> int:
    """Which of `n` things stands at a place in an endless row of shuffled epochs."""
    return int(_epoch(seed, place // n, n)[place % n])


@lru_cache(maxsize=2)
def _epoch(seed: int, epoch: int, n: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(n)


def endless_series(law: Law, seed: int, place: int) -> np.ndarray:
    """The series at a place in an endless row of systems drawn from a law, (n_steps, n_variables); none comes twice."""
    return _block(law, seed, place // _BLOCK)[place % _BLOCK]


@lru_cache(maxsize=2)
def _block(law: Law, seed: int, block: int) -> np.ndarray:
    return solve(law.draw(_BLOCK, [seed, 2, block]), law.time)


def augmented_window(
    values: np.ndarray,
    place: int,
    settings: TrainSettings,
    codec: Codec,
    tokenizer: PreTrainedTokenizerBase,
) -> np.ndarray:
    """Token ids of a stretch of the series (n_steps, n_variables) at a place, rescaled or begun at random."""
    draw = np.random.default_rng([settings.seed, 1, place])
    values = values * np.exp(draw.uniform(-settings.rescale, settings.rescale))
    (ids,) = tokenise([codec.encode(values)], tokenizer)
    length = settings.max_length
    if settings.random_start:
        last = max(1, len(ids) - max(2, length // 4) + 1)  # so that a window is no mere stub
        start = draw.integers(last) * draw.integers(2)
        return ids[start : start + length]
    start, stop = draw.choice([w for w in windows(len(ids), length, length) if w[1] - w[0] > 1])
    return ids[start:stop]
