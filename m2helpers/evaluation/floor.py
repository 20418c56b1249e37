"""The floor: the forecast of somebody who is told the law of the systems, on the windows of P5, and how far a model is from it.

It is the posterior predictive of `posterior`: its median is the best answer for the mean absolute error, its draws are the best
distribution. Where a window begins inside a series, nothing is assumed of the state it begins in, because a forecaster is not told how
long the series has run; there a forecaster who guesses that could be a little better still.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from ..data import Dataset
from ..files import UserError, atomic_path, sha256_json
from ..paths import FLOOR_CACHE, SHIPPED_FLOORS
from ..simulator import Law
from ..text import Codec
from .bounds import read_window
from .protocols import P5_STEPS, Case, make_cases
from .scores import Result, bootstrap

MIXED = 1.2
"""Split R-hat from which a window's chain counts as not mixed. Each walker is a chain, and a short one: that alone makes about 1.1."""

_VERSION = 2  # of the sampler: raise it whenever the figures change
_SAVE = 10  # windows between saves


@dataclass(frozen=True, eq=False)
class Floor:
    """Posterior predictives of windows, one row each, in the order of the protocol; a cache may hold the first ones only."""

    median: np.ndarray
    """(windows, steps, variables), in the units of the series; so are the next three."""
    low: np.ndarray
    """10 % quantiles."""
    high: np.ndarray
    """90 % quantiles."""
    crps: np.ndarray
    """Against the series as stored."""
    rhat: np.ndarray
    """Split R-hat, (windows,)."""
    effective: np.ndarray
    """Effective number of draws, (windows,)."""

    def __len__(self) -> int:
        return len(self.rhat)


def floor(
    dataset: Dataset,
    codec: Codec,
    law: Law,
    context: int,
    *,
    split: str = "test",
    limit: int | None = None,
    cache: Path = FLOOR_CACHE,
    progress: bool = True,
) -> Floor:
    """Posterior predictives of the P5 windows of a split, computed as far as they are not cached.

    They are saved every few windows: a call that was stopped is gone on with by the next.

    Parameters
    ----------
    limit : int, optional
        Only the first so many windows.
    cache : Path
        Folder; one file for each context, split, dataset and law.

    Raises
    ------
    UserError
        If `emcee` or `numba` is not installed and there is something to compute.
    """
    cases = make_cases(dataset.part(split), codec, "P5", context)[:limit]
    name, mark = _cached_as(dataset, codec, law, context, split)
    found = max((recorded_floor(dataset, codec, law, context, split, it) for it in (cache, SHIPPED_FLOORS)), key=len)
    rows = [tuple(getattr(found, f.name)[i] for f in fields(Floor)) for i in range(len(found))]
    todo = range(len(rows), len(cases))
    for index in tqdm(todo, f"floor, S = {context}", unit="window", disable=not progress):
        rows.append(_predict(dataset, codec, law, cases[index], [context, index]))
        if (index + 1) % _SAVE == 0 or index + 1 == len(cases):
            found = Floor(*map(np.array, zip(*rows, strict=True)))
            with atomic_path(cache / name) as temporary, open(temporary, "wb") as stream:
                values = {f.name: getattr(found, f.name).astype(np.float32) for f in fields(Floor)}
                np.savez_compressed(stream, mark=np.array(mark), **values)
    return Floor(*(getattr(found, f.name)[: len(cases)] for f in fields(Floor)))


def recorded_floor(
    dataset: Dataset, codec: Codec, law: Law, context: int, split: str = "test", folder: Path = SHIPPED_FLOORS
) -> Floor:
    """What was computed before, as far as it went, and nothing more; it has no rows where there is no record."""
    name, mark = _cached_as(dataset, codec, law, context, split)
    return _read(folder / name, mark)


def _cached_as(dataset: Dataset, codec: Codec, law: Law, context: int, split: str) -> tuple[str, str]:
    """The name of a cache, and what it must say of itself."""
    mark = sha256_json([_VERSION, law.sha256, dataset.sha256, codec.scale, codec.precision])
    return f"P5-{split}-{context}-{dataset.sha256[:16]}.npz", mark


def _predict(dataset: Dataset, codec: Codec, law: Law, case: Case, seed: list[int]) -> tuple:
    """A row of a `Floor`."""
    from .posterior import sample  # needs what is installed for this alone

    reading = read_window(case.context, codec, begins=case.start == 0)
    first = case.context.count(codec.step_separator) + case.skip
    draws = sample(law, reading, range(first, first + P5_STEPS), seed=seed, mixed=MIXED)
    low, median, high = np.quantile(draws.future, [0.1, 0.5, 0.9], axis=0)
    return median, low, high, crps(draws.future, case.stored), draws.rhat, draws.effective


def crps(draws: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Continuous ranked probability score of draws (n, …) against a truth (…): ``E|X − y| − ½ E|X − X'|``.

    Source: Gneiting and Raftery, "Strictly proper scoring rules, prediction, and estimation", 2007, eq. 21.
    """
    draws = np.sort(draws, axis=0)
    n = len(draws)
    ranks = (2 * np.arange(1, n + 1) - n - 1).reshape(-1, *[1] * truth.ndim)
    return np.abs(draws - truth).mean(axis=0) - (ranks * draws).sum(axis=0) / n**2


def _read(path: Path, mark: str) -> Floor:
    """What a cache holds; nothing if it is missing, damaged or of something else."""
    empty = np.empty((0, P5_STEPS, 2))
    try:
        with np.load(path, allow_pickle=False) as file:
            if str(file["mark"]) == mark:
                return Floor(**{f.name: file[f.name] for f in fields(Floor)})
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        pass
    return Floor(empty, empty, empty, empty, np.empty(0), np.empty(0))


@dataclass(frozen=True)
class FloorRow:
    """What the floor is worth at one length of context, over the windows whose chains mixed."""

    context: int
    n: int
    """Windows computed."""
    n_mixed: int
    mae: float
    """Of the medians as text against the truth as text, mean over windows, steps and variables: on a model's terms."""
    ci_mae: list[float]
    mae_stored: float
    """Of the medians as they are against the series as stored."""
    crps: float
    ci_crps: list[float]
    coverage_80: float
    """Share of the truth between the 10 % and the 90 % quantile."""
    effective: float
    """Median effective number of draws."""
    series: list[int]
    """Which series each window is from."""
    window_mae: list[float | None]
    """None where the chain did not mix."""
    window_crps: list[float | None]


def floor_row(dataset: Dataset, codec: Codec, context: int, found: Floor, split: str = "test") -> FloorRow:
    """The scores of what `floor` computed.

    Raises
    ------
    UserError
        If no chain mixed.
    """
    cases = make_cases(dataset.part(split), codec, "P5", context)[: len(found)]
    mixed = found.rhat < MIXED
    if not mixed.any():
        raise UserError(f"S = {context}: none of {len(found)} chains mixed; compute more windows")
    stored, written = (np.stack([getattr(case, name) for case in cases]) for name in ("stored", "truth"))
    series = [case.series for case in cases]
    errors = np.abs(codec.rounded(found.median) - written).mean(axis=(1, 2))  # (windows,)
    scores = found.crps.mean(axis=(1, 2))
    covered = (found.low <= stored) & (stored <= found.high)
    window_mae, window_crps = (
        [float(f"{v:.6g}") if m else None for v, m in zip(values, mixed, strict=True)] for values in (errors, scores)
    )
    return FloorRow(
        context,
        len(found),
        int(mixed.sum()),
        float(errors[mixed].mean()),
        list(bootstrap(window_mae, series)),
        float(np.abs(found.median - stored)[mixed].mean()),
        float(scores[mixed].mean()),
        list(bootstrap(window_crps, series)),
        float(covered[mixed].mean()),
        float(np.median(found.effective[mixed])),
        series,
        window_mae,
        window_crps,
    )


def bayes_gap(records: Mapping[str, Sequence[Result]], floors: Sequence[FloorRow]) -> pd.DataFrame:
    """How many times the floor's a model's mean absolute error and CRPS are, on the windows that both have.

    Parameters
    ----------
    records : mapping of name to results
        Of P5 on the split of the floors; results of another protocol or length of context are passed over.

    Returns
    -------
    DataFrame
        A row for each model and length of context: `model`, `S`, `n`, `MAE`, `floor`, `MAE gap` with its bootstrap 95 % interval `low`
        and `high`; `CRPS`, `floor CRPS` and `CRPS gap` are NaN where the model's distributions were not measured.
    """
    rows = []
    for name, results in records.items():
        for result in results:
            ours = [row for row in floors if (result.protocol, result.context) == ("P5", row.context)]
            if not ours or not result.n_valid:
                continue
            (row,) = ours
            mae, low, high = _ratio(result.window_mae, row.window_mae, row.series)
            entry = {"model": name, "S": row.context, "n": mae[2], "MAE": mae[0], "floor": mae[1]}
            entry |= {"MAE gap": mae[0] / mae[1], "low": low, "high": high}
            spread = result.distribution
            if spread is not None:
                score, _, _ = _ratio(spread.window_crps, row.window_crps, row.series)
                entry |= {"CRPS": score[0], "floor CRPS": score[1], "CRPS gap": score[0] / score[1]}
            rows.append(entry)
    return pd.DataFrame(rows)


def _ratio(
    theirs: Sequence[float | None], floors: Sequence[float | None], series: Sequence[int]
) -> tuple[tuple[float, float, int], float, float]:
    """Both means on the windows that both have, their number, and the bootstrap interval of the ratio."""
    both = [(a, b, s) for a, b, s in zip(theirs, floors, series, strict=False) if a is not None and b is not None]
    model, floor_, kept = zip(*both, strict=True)
    return (float(np.mean(model)), float(np.mean(floor_)), len(both)), *bootstrap(model, kept, floor_)
