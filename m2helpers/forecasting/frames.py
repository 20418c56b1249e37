"""Forecasts of a user's own table as DataFrames: a table in, its names and times continued, out."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from ..models import Base, load_base
from ..runs import Run, load_run
from ..series import table_of
from ..text import Codec
from .tables import Forecasts, Outlook, forecast_table

LEVELS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def wide_frame(forecasts: Forecasts, levels: Sequence[float] | None = None) -> pd.DataFrame:
    """A row for each step of each path, or of each series with `levels`: series, sample, step, time, then the variables.

    Parameters
    ----------
    levels : sequence of float, optional
        Quantiles of the samples, a column each (``prey_0.1``), in place of the samples themselves.
    """
    table, parts = forecasts.table, []
    for outlook in forecasts.outlooks:
        if outlook.problem:
            continue
        blocks, names = _shortened(outlook.paths, outlook), list(table.variables)
        if levels:
            bands = _shortened(outlook.distribution.quantile(levels), outlook)  # (levels, steps, variables)
            blocks = bands.transpose(1, 2, 0).reshape(1, len(bands[0]), -1)
            names = [f"{variable}_{level:g}" for variable in table.variables for level in levels]
        for sample, block in enumerate(blocks):
            part = pd.DataFrame(block, columns=names)
            if outlook.times is not None and table.time_name is not None:
                part.insert(0, table.time_name, outlook.times)
            part.insert(0, _free("step", names, table.time_name), np.arange(1, len(block) + 1))
            if not levels:
                part.insert(0, _free("sample", names, table.time_name), sample)
            part.insert(0, table.id_name or _free("series", names, table.time_name), outlook.history.name)
            parts.append(part[np.isfinite(block).any(axis=1)])
    return pd.concat(parts, ignore_index=True)


def long_frame(forecasts: Forecasts, levels: Sequence[float] = LEVELS) -> pd.DataFrame:
    """A row for each step of each variable: name of the series, time, ``target_name``, ``predictions``, a column for each level."""
    table, parts = forecasts.table, []
    sampled = len(forecasts.outlooks[0].paths) > 1
    for outlook in forecasts.outlooks:
        if outlook.problem:
            continue
        middle = outlook.median  # (steps, variables)
        bands = outlook.distribution.quantile(levels) if sampled else np.empty((0, *middle.shape))
        for column, variable in enumerate(table.variables):
            part = pd.DataFrame({"target_name": variable, "predictions": middle[:, column]})
            for level, band in zip(levels, bands[..., column], strict=False):  # none of a path alone
                part[f"{level:g}"] = band
            steps = np.arange(1, len(part) + 1)
            part.insert(0, table.time_name or "step", steps if outlook.times is None else outlook.times)
            if table.id_name or len(forecasts.outlooks) > 1:
                part.insert(0, table.id_name or "series", outlook.history.name)
            parts.append(part[part["predictions"].notna()])
    return pd.concat(parts, ignore_index=True)


def _shortened(values: np.ndarray, outlook: Outlook) -> np.ndarray:
    """Paths (..., steps, variables) with one digit more than their text has, for it knows no more."""
    columns = list(np.moveaxis(values, -1, 0))
    for i, unit in enumerate(np.broadcast_to(outlook.resolution, len(columns)).tolist()):
        if unit > 0:
            decimals = 1 - math.floor(math.log10(unit))
            rounded = [round(x, decimals) for x in columns[i].ravel().tolist()]
            columns[i] = np.array(rounded).reshape(columns[i].shape)
    return np.stack(columns, axis=-1)


def _free(name: str, names: Sequence[str], time_name: str | None) -> str:
    return name + "_" if name in (*names, time_name) else name


def forecast_frame(
    df: pd.DataFrame,
    steps: int,
    *,
    id_column: str | None = None,
    time_column: str | None = None,
    targets: Sequence[str] | None = None,
    levels: Sequence[float] = LEVELS,
    samples: int = 20,
    base: Base | str | None = None,
    run: Run | str | os.PathLike | None = None,
    together: bool | None = None,
    constrained: bool = True,
    seed: int = 0,
) -> pd.DataFrame:
    """Forecast the series of a DataFrame; a DataFrame of predictions in the manner of Chronos-2's ``predict_df``.

    Parameters
    ----------
    df : DataFrame
        A row for each step (of each series), a column for each variable; see `series.read_table`.
    steps : int
        Steps ahead.
    id_column, time_column : str, optional
        Columns of the series' names and of times; recognised if left out.
    targets : sequence of str, optional
        Columns to forecast; by default all others.
    levels : sequence of float
        Quantiles, from the samples.
    samples : int
        Paths drawn for each series; 0 for the likeliest alone, without quantiles.
    base : Base or str, optional
        Or the name of one; by default `defaultmodel_of()`.
    run : Run or path, optional
        A finished run, in place of a base.
    together, constrained, seed
        As in `forecast_table` and `forecasting.generate`.

    Returns
    -------
    DataFrame
        Columns: that of the names if there are several series, that of times (or ``step``), ``target_name``, ``predictions`` (the
        median, or the likeliest), and one for each level (``0.1``). Its ``attrs["notices"]`` say what was read, as what.
    """
    table = table_of(df, time=time_column, columns=targets, id=id_column)
    base, codec = model_of(base, run)
    forecasts = forecast_table(
        base, table, steps, codec=codec, together=together, samples=samples, seed=seed, constrained=constrained
    )
    frame = long_frame(forecasts, levels)
    frame.attrs["notices"] = [table.notice, *forecasts.notices]
    return frame


def model_of(base: Base | str | None, run: Run | str | os.PathLike | None) -> tuple[Base, Codec | None]:
    """The base that a call names, or that of the run it names, and the run's codec."""
    if run is not None:
        run = run if isinstance(run, Run) else load_run(Path(run))
        return run.base, run.codec
    return base if isinstance(base, Base) else load_base(base), None
