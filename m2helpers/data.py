"""The predator-prey data: the strict loader, the split and its statistics."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import pandas as pd

from .files import UserError, check_memory
from .paths import DATA_FILE

VARIABLES = ("prey", "predator")
SPLIT_SEED = 42
STATISTICS = ("mean", "sd", "1 %", "25 %", "50 %", "75 %", "99 %", "max")
COURSE_STATISTICS = pd.DataFrame(
    [[1.698, 1.436, 0.072, 0.728, 1.314, 2.220, 7.115, 13.74], [0.570, 0.379, 0.017, 0.277, 0.524, 0.804, 1.699, 4.77]],
    index=VARIABLES,
    columns=STATISTICS,
)  # the course's own file, which is not shipped here
COURSE_P997, COURSE_P997_TRAIN, COURSE_FADING = 7.93, 8.214, 0.02
FADING_BELOW = 0.02  # a predator that ends below this is counted as dying out

_SPARSE = 1 << 28  # bytes of an array from which on a small file is no honest one
_MINIMUM_TRAJECTORIES = 10  # with fewer, an 80 / 10 / 10 split leaves a part empty


# ---------------------------------------------------------------- loading


@dataclass(frozen=True, eq=False)
class Dataset:
    """A checked dataset. `sha256` is over the values, so saving them again in another file does not change it."""

    path: Path
    time: np.ndarray  # float64 (steps,)
    trajectories: np.ndarray  # float32 (systems, steps, 2), prey first
    sha256: str

    def part(self, name: str) -> np.ndarray:
        """Trajectories of the "train", "validation" or "test" part, float32 (systems in it, steps, 2)."""
        parts = split(len(self.trajectories))
        if name not in parts:
            raise UserError(f"split {name!r}: no such part; use one of {', '.join(parts)}")
        return self.trajectories[parts[name]]


def split(n: int, seed: int = SPLIT_SEED) -> dict[str, np.ndarray]:
    """Indices of an 80 / 10 / 10 % split of `n` trajectories, as "train", "validation" and "test".

    `sklearn.model_selection.train_test_split` is called twice, first with `test_size=0.2`, then 0.5 of the rest,
    so that results compare with the published ones.
    """
    from sklearn.model_selection import train_test_split  # takes a second to import

    train, rest = train_test_split(np.arange(n), test_size=0.2, random_state=seed)
    validation, test = train_test_split(rest, test_size=0.5, random_state=seed)
    return {"train": train, "validation": validation, "test": test}


def load_dataset(path: str | os.PathLike = DATA_FILE) -> Dataset:
    """Read and check a dataset; the file is opened read-only.

    Parameters
    ----------
    path : path-like
        HDF5 with `/trajectories` (systems, steps, 2), prey first, and `/time` (steps,), evenly spaced.

    Raises
    ------
    UserError
        If the file or a dataset in it is missing or unreadable, has the wrong shape, fewer than 10 trajectories,
        a value that is NaN, infinite or negative, or an uneven time axis.
    """
    path = Path(path)
    with open_hdf5(path) as file:
        trajectories = read_array(file, path, "trajectories", rank=3, layout="(systems, steps, 2)")
        time = read_array(file, path, "time", rank=1, layout="(steps,)")
    if trajectories.shape[2] != len(VARIABLES):
        raise UserError(f"{path}: last axis of /trajectories is {trajectories.shape[2]}; it must be 2: prey, predator")
    if len(trajectories) < _MINIMUM_TRAJECTORIES:
        raise UserError(f"{path}: {len(trajectories)} trajectories; add more, the split needs {_MINIMUM_TRAJECTORIES}")
    steps = trajectories.shape[1]
    if steps != len(time) or steps < 2:
        raise UserError(f"{path}: /trajectories has {steps} steps, /time {len(time)}; they must agree and be 2 or more")
    refuse_uneven_time(path, time)
    with np.errstate(over="ignore"):  # a value too large for float32 becomes infinite and is refused next
        trajectories = np.ascontiguousarray(trajectories, np.float32)
    refuse_first(path, trajectories, ~np.isfinite(trajectories), "populations must be finite, mend or drop it")
    refuse_first(path, trajectories, trajectories < 0, "populations cannot be negative, mend or drop it")
    time = np.ascontiguousarray(time, np.float64)
    return Dataset(path, time, trajectories, _content_hash(time, trajectories))


@contextmanager
def open_hdf5(path: Path) -> Iterator[h5py.File]:
    if not path.is_file():
        raise UserError(f"{path}: no such file; check the name, or make one: python -m m2helpers simulate --out {path}")
    try:
        with h5py.File(path, "r") as file:
            yield file
    except (OSError, RuntimeError) as error:  # some damage shows only when a block is read
        reason = str(error).partition("\n")[0]
        table = path.suffix.lower() in (".csv", ".tsv", ".txt", ".parquet")
        hint = f" (for a table of your own: python -m m2helpers backtest {path} --steps N)" if table else ""
        raise UserError(f"{path}: cannot be read as HDF5 ({reason}); restore it or give another{hint}") from None


def read_array(file: h5py.File, path: Path, name: str, rank: int, layout: str) -> np.ndarray:
    if isinstance(file.get(name, getlink=True), h5py.ExternalLink):
        raise UserError(f"{path}: /{name} lies in another file; write its values into this one")
    dataset = file.get(name)
    if not isinstance(dataset, h5py.Dataset):
        raise UserError(f"{path}: has no dataset /{name}, only {sorted(file, key=str)}; add it as {layout}")
    if dataset.shape is None or len(dataset.shape) != rank:
        raise UserError(f"{path}: /{name} has shape {dataset.shape}; it must have rank {rank}, {layout}")
    if dataset.dtype.kind not in "fiu":
        raise UserError(f"{path}: /{name} holds {dataset.dtype}; it must hold real numbers")
    size, stored = dataset.size * max(8, dataset.dtype.itemsize), path.stat().st_size
    if size > _SPARSE and size > 2000 * stored:  # nothing packs numbers that well: none were ever written
        raise UserError(
            f"{path}: /{name} says it holds {size / 1e9:,.1f} GB, and the file {stored / 1e6:.1f} MB; it is damaged"
        )
    check_memory(f"{path}: /{name}", 3 * size, "give fewer series")
    if dataset.external or dataset.is_virtual:
        raise UserError(f"{path}: /{name} lies in another file; write its values into this one")
    return dataset[()]


def refuse_uneven_time(path: Path, time: np.ndarray) -> None:
    with np.errstate(invalid="ignore"):
        gaps = np.diff(time.astype(np.float64))
    usual = float(np.median(gaps[np.isfinite(gaps)])) if np.isfinite(gaps).any() else 0.0
    even = (np.abs(gaps - usual) <= 1e-4 * usual) & (usual > 0)  # float32 times are even to about 1e-5 of a step
    if not even.all():
        step = int(np.argmin(even))
        raise UserError(
            f"{path}: uneven time axis, from step {step} to the next it goes by {gaps[step]:g} and elsewhere by "
            f"{usual:g}; resample to even, rising times"
        )


def refuse_first(path: Path, values: np.ndarray, bad: np.ndarray, remedy: str) -> None:
    if bad.any():
        where = tuple(int(index) for index in np.argwhere(bad)[0])
        raise UserError(
            f"{path}: trajectory {where[0]}, step {where[1]}, variable {where[2]} is {values[where]} "
            f"(counting from 0); {remedy}"
        )


def _content_hash(time: np.ndarray, trajectories: np.ndarray) -> str:
    digest = hashlib.sha256(str(trajectories.shape).encode())
    digest.update(time.astype("<f8").tobytes() + trajectories.astype("<f4").tobytes())
    return digest.hexdigest()


# ---------------------------------------------------------------- statistics


def summary(trajectories: np.ndarray) -> pd.DataFrame:
    """Mean, standard deviation, percentiles and maximum of each population, over all systems and steps.

    Parameters
    ----------
    trajectories : array (systems, steps, 2)

    Returns
    -------
    DataFrame
        Rows `VARIABLES`, columns `STATISTICS`.
    """
    values = np.asarray(trajectories, np.float64).reshape(-1, len(VARIABLES))
    percentiles = np.percentile(values, [1, 25, 50, 75, 99], axis=0)
    rows = np.vstack([values.mean(axis=0), values.std(axis=0), percentiles, values.max(axis=0)])
    return pd.DataFrame(rows.T, index=VARIABLES, columns=STATISTICS)


def statistics_table(dataset: Dataset) -> str:
    """Markdown tables of a dataset's statistics beside those of the course's file; the datasheet's marked block."""
    ours = summary(dataset.trajectories)
    lines = ["| | " + " | ".join(STATISTICS) + " |", "|---|" + "---:|" * len(STATISTICS)]
    for variable in VARIABLES:
        for label, table in (("this file", ours), ("course's file", COURSE_STATISTICS)):
            lines.append(f"| {variable}, {label} | " + " | ".join(f"{x:.3f}" for x in table.loc[variable]) + " |")
        change = ours.loc[variable] / COURSE_STATISTICS.loc[variable] - 1
        lines.append(f"| {variable}, difference | " + " | ".join(f"{x:+.1%}" for x in change) + " |")
    whole, train = (np.percentile(x.astype(np.float64), 99.7) for x in (dataset.trajectories, dataset.part("train")))
    fading = (dataset.trajectories[:, -1, 1] < FADING_BELOW).mean()
    lines += [
        "",
        "| | this file | course's file |",
        "|---|---:|---:|",
        f"| 99.7th percentile, both populations pooled | {whole:.2f} | {COURSE_P997:.2f} |",
        f"| the same, training part | {train:.3f} | {COURSE_P997_TRAIN:.3f} |",
        f"| systems whose predator ends below {FADING_BELOW} | {fading:.1%} | about {COURSE_FADING:.0%} |",
    ]
    return "\n".join(lines)
