"""The user's own series: a table of numbers in, whatever its shape."""

from __future__ import annotations

import os
from pathlib import Path

import h5py
import numpy as np
import pandas as pd

from .data import open_hdf5, read_array, refuse_first, refuse_uneven_time
from .files import UserError


def read_series(path: str | os.PathLike) -> np.ndarray:
    """Read the user's own series, of any number of variables, for forecasting.

    Parameters
    ----------
    path : path-like
        CSV: one row a step, one column a variable, header optional; a first column headed `time`, `t` or nothing
        (a saved row index) is dropped. HDF5: `/trajectories` (series, steps, variables).

    Returns
    -------
    float64 array (series, steps, variables)
        A CSV file holds one series. Negative values are allowed.

    Raises
    ------
    UserError
        If the file cannot be read, holds no number, a cell that is not a finite number, or an uneven time.
    """
    path = Path(path)
    if path.suffix.lower() in (".h5", ".hdf5") or (path.is_file() and h5py.is_hdf5(path)):
        with open_hdf5(path) as file:
            series = read_array(file, path, "trajectories", rank=3, layout="(series, steps, variables)")
            if "time" in file:
                refuse_uneven_time(path, read_array(file, path, "time", rank=1, layout="(steps,)"))
        series = series.astype(np.float64)
    else:
        series = _read_csv(path)[np.newaxis]  # (1, steps, variables)
    if 0 in series.shape:
        raise UserError(f"{path}: no value in it (series, steps, variables = {series.shape}); give at least one step")
    refuse_first(path, series, ~np.isfinite(series), "every value must be a finite number, fill or drop it")
    return series


def _read_csv(path: Path) -> np.ndarray:
    try:
        how = dict(header=None, skipinitialspace=True, skip_blank_lines=False, encoding="utf-8-sig")
        cells = pd.read_csv(path, dtype=str, **how)
    except (OSError, ValueError) as error:  # pandas' own errors are ValueErrors
        reason = str(error).partition("\n")[0]
        raise UserError(f"{path}: cannot be read as CSV ({reason}); give comma-separated text or HDF5") from None
    cells = cells.iloc[: np.flatnonzero(cells.notna().any(axis=1)).max(initial=0) + 1]  # blank lines at the end
    numbers = cells.apply(pd.to_numeric, errors="coerce").astype(np.float64)
    text = numbers.iloc[0].isna().all() and cells.iloc[0].notna().any()
    counted = pd.isna(cells.iloc[0, 0]) and cells.iloc[0, 1:].tolist() == [str(i) for i in range(cells.shape[1] - 1)]
    if text or counted:  # a header: text and no number, or the one pandas writes for columns without names
        first_name = str(cells.iloc[0].fillna("")[0]).strip().lower()
        numbers = numbers.iloc[1:]
        if first_name in ("time", "t", ""):
            if numbers[0].notna().all():  # dates are taken on trust
                refuse_uneven_time(path, numbers[0].to_numpy())
            numbers = numbers.iloc[:, 1:]
    return numbers.to_numpy()  # (steps, variables)
