"""The law of a dataset's systems: the equations fitted to every series of a training split, and how their parameters are spread.

From it, systems like those of the dataset can be drawn without end. Only the training split is looked at.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from scipy.stats import norm, rankdata

from ..data import Dataset
from ..files import UserError, read_json, sha256_json, write_json
from ..paths import LAW_CACHE, SHIPPED_LAWS
from .draws import PARAMETERS
from .fits import ACCEPTED, fit_systems

_DIGITS = 7  # of a parameter, as recorded: the fits are known to about five
_TAIL = 10  # order statistics at either end whose mean spacing says how far beyond the last one a margin reaches


@dataclass(frozen=True, eq=False)
class Law:
    """A distribution over systems: the empirical margin of each parameter, tied by a Gaussian copula.

    Standard normals with the fitted correlations, one per parameter, turn into parameters by each margin's quantiles
    (Nelsen, *An Introduction to Copulas*, 2006). Nothing about the shape of a margin is assumed.
    """

    parameters: np.ndarray
    """Of the systems it was fitted to, float64 (systems, 8), columns `PARAMETERS`."""
    dt: float
    """Time between two steps of the series."""
    steps: int
    """Steps of a series."""
    about: dict[str, str | int | float] = field(default_factory=dict)
    """What it was fitted to, and how well."""

    @property
    def sha256(self) -> str:
        """Of what decides its draws."""
        return sha256_json({"parameters": self.parameters.tolist(), "dt": self.dt, "steps": self.steps})

    @cached_property
    def correlation(self) -> np.ndarray:
        """Correlations of the parameters' normal scores, (8, 8)."""
        scores = norm.ppf(rankdata(self.parameters, axis=0) / (len(self.parameters) + 1))
        return np.corrcoef(scores, rowvar=False)

    @cached_property
    def margins(self) -> np.ndarray:
        """Quantiles of every parameter at 0, 1 / (n + 1), … 1, (n + 2, 8): the fitted values, and a bit more at both ends."""
        values = np.sort(self.parameters, axis=0)
        tail = min(_TAIL, len(values) - 1)
        low = values[0] - (values[tail] - values[0]) / tail
        high = values[-1] + (values[-1] - values[-1 - tail]) / tail
        return np.vstack([np.maximum(low, 0.0), values, high])

    def quantiles(self, shares: np.ndarray) -> np.ndarray:
        """Parameters (n, 8) that have these shares, (n, 8), of their margins below them."""
        places = np.linspace(0.0, 1.0, len(self.margins))
        columns = [np.interp(share, places, margin) for share, margin in zip(shares.T, self.margins.T, strict=True)]
        return np.stack(columns, axis=1)

    def draw(self, n: int, seed: int | list[int]) -> np.ndarray:
        """Draw systems: parameters (n, 8), columns `PARAMETERS`."""
        normals = np.random.default_rng(seed).standard_normal((n, len(PARAMETERS)))
        return self.quantiles(norm.cdf(normals @ np.linalg.cholesky(self.correlation).T))

    @property
    def time(self) -> np.ndarray:
        """Times of a series' steps, (steps,)."""
        return self.dt * np.arange(self.steps)

    def save(self, path: Path) -> None:
        """Write it as JSON: what it was fitted to, and the parameters by name."""
        columns = {name: column.tolist() for name, column in zip(PARAMETERS, self.parameters.T, strict=True)}
        write_json(path, {"about": self.about, "dt": self.dt, "steps": self.steps, "parameters": columns})


def load_law(path: Path) -> Law:
    """Read what `Law.save` wrote (`UserError` where a file holds anything else)."""
    record = read_json(path)
    try:
        parameters = np.array([record["parameters"][name] for name in PARAMETERS], dtype=np.float64).T
        return Law(parameters, float(record["dt"]), int(record["steps"]), record["about"])
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{path}: holds no fitted law; delete it, and it is fitted again") from None


def law_of(dataset: Dataset) -> Law:
    """The law of a dataset: the shipped record, or one made before, else fitted now (a quarter of a minute) and kept."""
    name = f"{dataset.sha256[:16]}.json"
    for folder in (LAW_CACHE, SHIPPED_LAWS):
        if (folder / name).is_file():
            return load_law(folder / name)
    law = fit_law(dataset, progress=True)
    law.save(LAW_CACHE / name)
    return law


def fit_law(dataset: Dataset, *, progress: bool = False) -> Law:
    """Fit the equations to every series of a dataset's training split (`fit_systems`), and keep those that fit.

    Raises
    ------
    UserError
        If they fit fewer than half of the series: the data follow another law.
    """
    series, dt = dataset.part("train"), float(np.diff(dataset.time).mean())
    parameters, costs = fit_systems(series, dt, progress=progress)
    kept = costs < ACCEPTED
    if kept.mean() < 0.5:
        raise UserError(
            f"{dataset.path}: the predator-prey equations fit {kept.sum()} of {len(series)} training series; "
            "give data that follow them"
        )
    rounded = np.array([[float(f"{value:.{_DIGITS}g}") for value in row] for row in parameters[kept]])
    about: dict[str, str | int | float] = {
        "data_sha256": dataset.sha256,
        "split": "train",
        "series": len(series),
        "fitted": int(kept.sum()),
        "accepted_below": ACCEPTED,  # half the sum of squares of a series
        "median_cost": float(f"{np.median(costs[kept]):.3g}"),
    }
    return Law(rounded, dt, len(dataset.time), about)
