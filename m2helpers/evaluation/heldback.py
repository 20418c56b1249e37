"""The last rows of a user's own table held back and forecast: how good its forecasts would have been."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from typing import Any  # options passed on

import numpy as np
import pandas as pd

from ..files import UserError
from ..forecasting import Forecasts, Outlook, forecast_table
from ..forecasting.frames import model_of
from ..forecasting.tables import SHORTEST
from ..models import Base
from ..runs import Run
from ..series import Table, read_table, table_of
from .baselines import last_value
from .naive import parrot, seasonal_naive


def forecast_held_back(base: Base, table: Table, steps: int, windows: int = 1, **how: Any) -> Forecasts:
    """Forecast the last `windows` times `steps` rows of every series, each from what comes before it, the truth beside them.

    Parameters
    ----------
    **how
        As in `forecast_table`.

    Raises
    ------
    UserError
        If a series is too short.
    """
    if windows < 1 or steps < 1:
        raise UserError(f"cannot hold back {windows} windows of {steps} steps; ask for at least 1 of each")
    pairs = [(history, window) for history in table.histories for window in range(windows, 0, -1)]
    for history in table.histories:
        n, needed = len(history.values), steps * windows + SHORTEST
        if n < needed:
            whose = f"series {history.name}" if len(table.histories) > 1 else "it"
            raise UserError(f"{table.source}: {whose} has {n} rows; {windows} windows of {steps} steps need {needed}")
    known = tuple(history.first(len(history.values) - steps * window) for history, window in pairs)
    forecasts = forecast_table(base, replace(table, histories=known), steps, **how)
    outlooks = []
    for outlook, (history, window) in zip(forecasts.outlooks, pairs, strict=True):
        came = history.last(steps * window).first(steps)
        outlooks.append(replace(outlook, index=came.index, truth=came.values))
    return replace(forecasts, outlooks=outlooks)


def scores(forecasts: Forecasts) -> pd.DataFrame:
    """The table of `backtest`, from what `forecast_held_back` made."""
    whole = [o for o in forecasts.outlooks if not o.problem and not np.isnan(o.paths).all(axis=0).any()]
    if not whole:
        raise UserError(f"{forecasts.table.source}: no forecast is whole, so none can be measured; add --constrained")
    truth = np.stack([o.truth for o in whole if o.truth is not None])  # (windows, steps, variables)
    contexts, steps = [o.history.values for o in whole], truth.shape[1]
    methods = {
        "this model": np.stack([o.median for o in whole]),
        "last value": np.stack([last_value(context, steps, 1.0) for context in contexts]),
        "last season": np.stack([seasonal_naive(context, steps) for context in contexts]),
        "context parroting": np.stack([parrot(context, steps) for context in contexts]),
    }
    rows = []
    for column, variable in enumerate(forecasts.table.variables):
        reference = np.abs(methods["last value"] - truth)[..., column].mean()
        for name, made in methods.items():
            error = (made - truth)[..., column]
            row = dict(target_name=variable, method=name, mae=np.abs(error).mean(), rmse=(error**2).mean() ** 0.5)
            row["to_last_value"] = row["mae"] / reference if reference > 0 else math.nan
            if len(whole[0].paths) > 1:
                row["coverage_80"] = np.mean([_inside(o, column) for o in whole]) if name == "this model" else math.nan
            rows.append(row | {"windows": len(whole)})
    return pd.DataFrame(rows)


def _inside(outlook: Outlook, column: int) -> float:
    """The share of one window's truth that lies within its 10 % to 90 % band."""
    assert outlook.truth is not None
    low, high = outlook.distribution.quantile([0.1, 0.9])[..., column]  # each (steps,)
    truth = outlook.truth[:, column]
    return float(((low <= truth) & (truth <= high)).mean())


def backtest(
    data: str | os.PathLike | pd.DataFrame | Table,
    steps: int,
    windows: int = 1,
    *,
    samples: int = 20,
    base: Base | str | None = None,
    run: Run | str | os.PathLike | None = None,
    **how: Any,
) -> pd.DataFrame:
    """Hold back the last rows of the user's own series, forecast them, and measure the error beside simple forecasts.

    Parameters
    ----------
    data : path, DataFrame or Table
    steps, windows : int
        `windows` times `steps` rows are held back, each window forecast from all that comes before it.
    samples, base, run
        As in `forecast_frame`.
    **how
        As in `forecast_table`.

    Returns
    -------
    DataFrame
        A row for each variable and method: ``target_name, method, mae, rmse, to_last_value`` (ratio of mean absolute errors),
        ``coverage_80`` (share of the truth within the 10 % to 90 % band, where samples were drawn) and ``windows``.
    """
    table = data if isinstance(data, Table) else table_of(data) if isinstance(data, pd.DataFrame) else read_table(data)
    base, codec = model_of(base, run)
    how = {"constrained": True} | how
    return scores(forecast_held_back(base, table, steps, windows, samples=samples, codec=codec, **how))
