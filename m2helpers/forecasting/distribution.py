"""What may come: the distribution of each value of the steps ahead, and what a forecast that is a distribution is worth.

Text has a resolution: a value written with so many decimals stands for the interval of numbers that round to it, its cell. A
predictive distribution is therefore a mixture over cells, and inside a cell the mass is taken to be spread evenly. An affine change
of units (a level taken out, a scale) leaves cells intervals of one width, so all of it is exact in the units of the series.
No torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

TIE = 1e-9  # of mass: a level so near to a cell's end is met exactly, whatever order the masses were added in

Cells = tuple[np.ndarray, np.ndarray]
"""Cells of one value, int (n,), and their mass, (n,); a cell may stand more than once."""


@dataclass(frozen=True, eq=False)
class Distribution:
    """The distributions of single values, by step ahead and variable (their marginals, not how they hang together).

    Cell k of a variable is the interval ``level + (k ± ½) · width``, in the units of the series. Where nothing is known of a
    value (no path came so far), all its figures are NaN.

    Make one with `from_paths` or `from_cells`; ``distribution[1:]`` is that of the later steps.
    """

    cells: np.ndarray
    """int64 (steps, variables, n): cells with mass, rising; the last one repeated where there are fewer."""
    mass: np.ndarray
    """float64 (steps, variables, n), of sum 1; 0 where a cell is repeated, and all 0 where nothing is known."""
    width: np.ndarray
    """(variables,), of a cell."""
    level: np.ndarray
    """(variables,), the middle of cell 0."""
    pruned: np.ndarray
    """(steps,): the share of mass that was left out before the rest was scaled to 1; 0 for samples."""

    @classmethod
    def from_paths(
        cls, paths: np.ndarray, width: ArrayLike, level: ArrayLike = 0.0, weights: ArrayLike | None = None
    ) -> Distribution:
        """From sampled forecasts: each step has the cells of the paths that reach it.

        Parameters
        ----------
        paths : (paths, steps, variables)
            In the units of the series; NaN where a path did not come so far.
        width : float or (variables,)
            Of a cell: `Codec.resolution`, divided by a column's own scale.
        level : float or (variables,)
            The middle of cell 0: a column's own level.
        weights : (paths,), optional
            By default all alike.
        """
        n_paths, _, n_variables = paths.shape
        width, level = (np.broadcast_to(np.asarray(x, dtype=float), n_variables) for x in (width, level))
        weigh = np.ones(n_paths) if weights is None else np.asarray(weights, dtype=float)
        known = np.isfinite(paths)
        numbers = np.rint(np.where(known, (paths - level) / width, 0)).astype(np.int64)  # (paths, steps, variables)
        marginals = [
            [(numbers[:, step, i][seen[:, i]], weigh[seen[:, i]]) for i in range(n_variables)]
            for step, seen in enumerate(np.moveaxis(known, 1, 0))
        ]
        return cls.from_cells(marginals, width, level)

    @classmethod
    def from_cells(
        cls,
        marginals: Sequence[Sequence[Cells]],
        width: ArrayLike,
        level: ArrayLike = 0.0,
        pruned: ArrayLike | None = None,
    ) -> Distribution:
        """From the cells and masses of each value, by step and variable; masses of one value are scaled to sum 1."""
        n_steps, n_variables = len(marginals), len(marginals[0])
        merged = [[_merge(*marginal) for marginal in step] for step in marginals]
        longest = max(len(mass) for step in merged for _, mass in step)
        cells = np.zeros((n_steps, n_variables, max(longest, 1)), dtype=np.int64)
        mass = np.zeros(cells.shape)
        for step, row in enumerate(merged):
            for i, (numbers, masses) in enumerate(row):
                if len(masses):
                    cells[step, i, : len(numbers)], cells[step, i, len(numbers) :] = numbers, numbers[-1]
                    mass[step, i, : len(masses)] = masses / masses.sum()
        width, level = (np.broadcast_to(np.asarray(x, dtype=float), n_variables) for x in (width, level))
        return cls(cells, mass, width, level, np.zeros(n_steps) if pruned is None else np.asarray(pruned, dtype=float))

    def __getitem__(self, steps: slice) -> Distribution:
        return Distribution(self.cells[steps], self.mass[steps], self.width, self.level, self.pruned[steps])

    # ---------------------------------------------------------------- what is expected

    def quantile(self, levels: ArrayLike) -> np.ndarray:
        """The values that lie above so much of the mass, (levels, steps, variables).

        Where no mass lies between two cells, the whole gap has one level, and its middle is given, as a median of an even number of
        samples is (definition 2 of Hyndman and Fan, "Sample quantiles in statistical packages", 1996).
        """
        up_to = self.mass.cumsum(-1)  # (steps, variables, n)
        found = []
        for level in np.atleast_1d(np.asarray(levels, dtype=float)):
            place = np.minimum((up_to < level - TIE).sum(-1, keepdims=True), self.mass.shape[-1] - 1)
            after = np.minimum(place + 1, self.mass.shape[-1] - 1)
            cell, mass, top = (np.take_along_axis(x, place, -1)[..., 0] for x in (self.cells, self.mass, up_to))
            inside = np.clip((level - top) / np.where(mass > 0, mass, 1) + 1, 0, 1)  # of the cell, from below
            at = cell - 0.5 + inside
            more = (after > place) & (np.take_along_axis(self.mass, after, -1) > 0)
            between = (np.abs(top - level) <= TIE) & more[..., 0]
            middle = (cell + np.take_along_axis(self.cells, after, -1)[..., 0]) / 2
            found.append(np.where(between, middle, at) * self.width + self.level)
        return self._known(np.array(found))

    @property
    def median(self) -> np.ndarray:
        """What the mean absolute error asks for, (steps, variables)."""
        return self.quantile(0.5)[0]

    @property
    def mean(self) -> np.ndarray:
        """What the mean squared error asks for, (steps, variables)."""
        return self._known((self.mass * self.cells).sum(-1) * self.width + self.level)

    # ---------------------------------------------------------------- what it is worth

    def cdf(self, values: ArrayLike) -> np.ndarray:
        """The mass below some values, (..., steps, variables) each its own: of the same shape."""
        return self._below(self._numbers(values))

    def crps(self, truth: ArrayLike) -> np.ndarray:
        """Continuous ranked probability score, (steps, variables), in the units of the series: ``∫ (F(x) − 1[x ≥ truth])² dx``.

        In closed form, as ``E|X − y| − ½ E|X − X'|``: within a cell of width w, ``E|X − y|`` is ``(d² + w²/4) / w`` where the truth y
        lies d off its middle, and ``E|X − X'|`` is ``w/3``.

        Source: Gneiting and Raftery, "Strictly proper scoring rules, prediction, and estimation", 2007, eq. 21.
        """

        def distance(off: np.ndarray) -> np.ndarray:  # in cells
            return np.where(off < 0.5, off**2 + 0.25, off)

        return self._score(self._numbers(truth), distance, 1 / 6)

    def crps_discrete(self, truth: ArrayLike) -> np.ndarray:
        """The same where the truth is a text's too, (steps, variables): all mass at the middles, so that the right cell scores 0."""
        return self._score(np.rint(self._numbers(truth)), np.asarray, 0.0)

    def pit(self, truth: ArrayLike) -> np.ndarray:
        """Probability integral transform F(truth), (steps, variables): evenly spread over [0, 1] where the distributions are right."""
        return self.cdf(truth)

    def pit_discrete(self, truth: ArrayLike) -> np.ndarray:
        """The same where the truth is a text's too: F below its cell and above it, (2, steps, variables).

        A histogram spreads the one unit of each value evenly over that interval.

        Source: Czado, Gneiting and Held, "Predictive model assessment for count data", 2009, eq. 2.
        """
        middle = np.rint(self._numbers(truth))
        return np.stack([self._below(middle - 0.5), self._below(middle + 0.5)])

    def probability(self, truth: ArrayLike) -> np.ndarray:
        """The mass of the cell that holds the truth, (steps, variables)."""
        here = np.rint(self._numbers(truth))[..., np.newaxis] == self.cells
        return self._known((self.mass * here).sum(-1))

    def _numbers(self, values: ArrayLike) -> np.ndarray:
        """Values counted in cells."""
        return (np.asarray(values, dtype=float) - self.level) / self.width

    def _below(self, numbers: np.ndarray) -> np.ndarray:
        share = np.clip(numbers[..., np.newaxis] - self.cells + 0.5, 0, 1)  # of each cell
        return self._known((self.mass * share).sum(-1))

    def _score(self, numbers: np.ndarray, distance: Callable[[np.ndarray], np.ndarray], own: float) -> np.ndarray:
        """``E|X − y| − ½ E|X − X'|``, given the mean `distance` to a cell whose middle is so far off, and half of that within one, `own`."""
        off = np.abs(numbers[..., np.newaxis] - self.cells)
        up_to = self.mass.cumsum(-1)
        apart = (np.diff(self.cells, axis=-1) * (up_to * (1 - up_to))[..., :-1]).sum(-1) + own * (self.mass**2).sum(-1)
        return self._known(((self.mass * distance(off)).sum(-1) - apart) * self.width)

    def _known(self, figures: np.ndarray) -> np.ndarray:
        """NaN where nothing is known."""
        return np.where(self.mass.any(-1), figures, np.nan)


def _merge(cells: np.ndarray, mass: np.ndarray) -> Cells:
    """Each cell once, rising, and none without mass."""
    numbers, place = np.unique(np.asarray(cells, dtype=np.int64), return_inverse=True)
    masses = np.bincount(place, np.asarray(mass, dtype=float), minlength=len(numbers))
    return numbers[masses > 0], masses[masses > 0]
