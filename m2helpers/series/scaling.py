"""Numbers of one column as the text has them: its own level taken out where it is large, its own scale."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..text import SCALE_PERCENTILE, SCALE_TARGET

FLOOR = 0.25  # of its range: a column whose lowest value is farther from zero is moved down to there
SPIKE = 100  # so many times the range of the middle 90 % off the median, one value would flatten all others

HIGHEST = 90  # times the percentile that is written as 10: what the digits before the point have room for


@dataclass(frozen=True, eq=False)
class Scaling:
    """How the columns of one series are written: text = (value − level) × scale, each its own."""

    level: np.ndarray
    """(variables,); 0 where nothing is taken out."""
    scale: np.ndarray
    """(variables,)"""

    def write(self, values: np.ndarray) -> np.ndarray:
        """Values (..., variables) as the text has them."""
        return (values - self.level) * self.scale

    def read(self, written: np.ndarray) -> np.ndarray:
        """The inverse of `write`."""
        return written / self.scale + self.level

    def of(self, columns: list[int]) -> Scaling:
        """The scaling of some of the columns."""
        return Scaling(self.level[columns], self.scale[columns])


def fit_scaling(values: np.ndarray) -> Scaling:
    """The level and scale of each column of a series, (steps, variables).

    A column that keeps its distance from zero, above or below, is moved towards it until `FLOOR` of its range is left: its
    decimals are spent on what moves. Its size (the percentile of `text.fit_scale`) then comes to 10. A constant column
    keeps its level, and one of zeros is written as it is.
    """
    low, high = values.min(axis=0), values.max(axis=0)
    room = FLOOR * (high - low)
    level = np.where(low > room, low - room, np.where(high < -room, high + room, 0.0))
    level = np.where(high > low, level, 0.0)
    sizes = np.abs(values - level)
    size = np.maximum(np.percentile(sizes, SCALE_PERCENTILE, axis=0), sizes.max(axis=0) / HIGHEST)
    with np.errstate(divide="ignore"):
        return Scaling(level, np.where(size > 0, SCALE_TARGET / size, 1.0))


def find_spike(values: np.ndarray) -> tuple[int, int, float] | None:
    """A value that would flatten all the others in the text: its row, its column, and how many times their range off it is."""
    # The nearest values inward, not interpolated: of few values, one spike would stretch the range itself.
    low = np.percentile(values, 5, axis=0, method="higher")  # (variables,)
    high = np.percentile(values, 95, axis=0, method="lower")
    middle, spread = np.median(values, axis=0), high - low
    with np.errstate(divide="ignore", invalid="ignore"):
        times = np.where(spread > 0, np.abs(values - middle) / spread, 0.0)
    row, column = np.unravel_index(times.argmax(), times.shape)
    return (int(row), int(column), float(times.max())) if times.max() > SPIKE else None
