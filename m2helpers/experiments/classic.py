"""Classic public series that nobody simulated: a base's forecasts beside simple and statistical ones, window by window.

Every method sees the same history and forecasts the same steps; none is tuned on them. The seasonal methods are told the season that the
calendar (of sunspots, the literature) gives; the base and the parrot are not.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import TypedDict

import numpy as np
import pandas as pd
from threadpoolctl import threadpool_limits

from ..evaluation.naive import parrot
from ..files import write_json
from ..forecasting import forecast_table
from ..models import Base
from ..series import table_of
from ..text import Codec
from .timing import machine

CONTEXT, AHEAD, MOST = 60, 8, 10  # steps known, steps forecast, windows a series at most, counted from its end
OURS = "this model"


@dataclass(frozen=True, eq=False)
class Classic:
    """One public series."""

    name: str
    values: np.ndarray
    """(steps, variables)"""
    season: int
    """Steps in a season; 1 for none."""

    @property
    def ends(self) -> list[int]:
        """Where the known parts of its windows end, the latest first."""
        ends = [len(self.values) - AHEAD * k for k in range(1, MOST + 1)]
        return [end for end in ends if end >= CONTEXT]


@dataclass(frozen=True, eq=False)
class Comparison:
    """The forecasts of one series' windows by every method."""

    classic: Classic
    forecasts: dict[str, list[np.ndarray | None]]
    """Method → (steps, variables) a window; None where the base's did not parse whole."""

    @property
    def truths(self) -> list[np.ndarray]:
        """(steps, variables) of each window."""
        return [self.classic.values[end : end + AHEAD] for end in self.classic.ends]

    @property
    def valid(self) -> int:
        """Windows that the base forecast whole: those that are compared."""
        return sum(f is not None for f in self.forecasts[OURS])

    def errors(self) -> dict[str, float]:
        """Mean absolute error of each method over that of the last value, mean over variables; NaN where no window is whole."""
        errors = {method: np.mean(self._errors(method), axis=0) for method in self.forecasts} if self.valid else {}
        return {m: float(np.mean(errors[m] / errors["last value"])) if errors else math.nan for m in self.forecasts}

    def duels(self) -> dict[str, tuple[int, int]]:
        """Windows that the base wins and loses against each other method, each variable in units of the last value's error."""
        if not self.valid:
            return {}
        unit = np.mean(self._errors("last value"), axis=0)
        ours = (self._errors(OURS) / unit).mean(axis=1)
        return {
            method: (int((ours < theirs).sum()), int((ours > theirs).sum()))
            for method in self.forecasts
            if method != OURS
            for theirs in [(self._errors(method) / unit).mean(axis=1)]
        }

    def _errors(self, method: str) -> np.ndarray:
        """(windows that the base forecast whole, variables)"""
        rows = zip(self.forecasts[method], self.forecasts[OURS], self.truths, strict=True)
        return np.array([np.abs(made - truth).mean(axis=0) for made, ours, truth in rows if ours is not None and made is not None])  # fmt: skip


def classic_series() -> list[Classic]:
    """Six series that `statsmodels` carries, of one to three variables, with seasons and without, some with negative values."""
    import statsmodels.api as sm  # slow, and few need it

    public = sm.datasets
    co2 = public.co2.load_pandas().data["co2"].resample("MS").mean().interpolate()
    return [
        Classic("sunspots, yearly", public.sunspots.load_pandas().data[["SUNACTIVITY"]].to_numpy(), 11),
        Classic(
            "sea surface off Peru (°C), monthly",
            public.elnino.load_pandas().data.set_index("YEAR").to_numpy().reshape(-1, 1),
            12,
        ),
        Classic("CO2 at Mauna Loa (ppm), monthly", co2.to_numpy()[:, None], 12),
        Classic("flow of the Nile, yearly", public.nile.load_pandas().data[["volume"]].to_numpy(), 1),
        Classic(
            "US inflation, unemployment, interest (%), quarterly",
            public.macrodata.load_pandas().data[["infl", "unemp", "tbilrate"]].to_numpy(),
            4,
        ),
        Classic(
            "German inflation, interest, quarterly",
            public.interest_inflation.load_pandas().data[["Dp", "R"]].to_numpy(),
            4,
        ),
    ]


def arima(context: np.ndarray, season: int) -> np.ndarray:
    """ARIMA(2,1,1) of each variable, with a seasonal autoregressive term where there is a season: (steps, variables)."""
    from statsmodels.tsa.arima.model import ARIMA

    seasonal = (1, 0, 0, season) if season > 1 else (0, 0, 0, 0)
    return _each(context, lambda x: ARIMA(x, order=(2, 1, 1), seasonal_order=seasonal).fit())


def ets(context: np.ndarray, season: int) -> np.ndarray:
    """Exponential smoothing with a damped trend, and additive seasons where there are any: (steps, variables)."""
    from statsmodels.tsa.holtwinters import ExponentialSmoothing

    how = {"seasonal": "add", "seasonal_periods": season} if season > 1 else {}
    return _each(context, lambda x: ExponentialSmoothing(x, trend="add", damped_trend=True, **how).fit())


METHODS: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {
    "last value": lambda context, season: np.repeat(context[-1:], AHEAD, axis=0),
    "seasonal naive": lambda context, season: np.resize(context[-season:], (AHEAD, context.shape[1])),
    "context parroting": lambda context, season: parrot(context, AHEAD),
    "ARIMA": arima,
    "ETS": ets,
}
"""What the base is compared with: (context (steps, variables), season) → (steps ahead, variables)."""


def compare_classics(base: Base) -> list[Comparison]:
    """Forecast the windows of every classic series by the base, as the command ``forecast`` would, and by every other method."""
    comparisons = []
    for classic in classic_series():
        contexts = [classic.values[end - CONTEXT : end] for end in classic.ends]
        forecasts: dict[str, list[np.ndarray | None]] = {OURS: by_base(base, classic)}
        for method, made in METHODS.items():
            forecasts[method] = [made(context, classic.season) for context in contexts]
        comparisons.append(Comparison(classic, forecasts))
    return comparisons


class Row(TypedDict):
    """What the record holds of one series."""

    series: str
    variables: int
    season: int
    windows: int
    valid: int
    """Windows that the base forecast whole."""
    errors: dict[str, float | None]
    """Method → error over that of the last value; None where no window is whole."""
    duels: dict[str, tuple[int, int]]
    """Method → windows that the base wins and loses against it."""


def record_classics(base: Base, comparisons: Sequence[Comparison], path: Path) -> list[Row]:
    """Write what comparisons came to, with what they rest on, and return the rows."""
    rows = [
        Row(
            series=c.classic.name,
            variables=c.classic.values.shape[1],
            season=c.classic.season,
            windows=len(c.truths),
            valid=c.valid,
            errors={method: None if math.isnan(error) else round(error, 4) for method, error in c.errors().items()},
            duels=c.duels(),
        )
        for c in comparisons
    ]
    about = {"base": base.short_name, "base_sha256": base.sha256, "machine": machine(), "date": str(date.today())}
    write_json(path, about | {"known": CONTEXT, "ahead": AHEAD, "rows": rows})
    return rows


def by_base(base: Base, classic: Classic, precision: int = 2) -> list[np.ndarray | None]:
    """The base's likeliest forecast of each window, (steps, variables); None where it does not parse whole."""
    table = table_of(pd.DataFrame(classic.values, columns=[f"v{i}" for i in range(classic.values.shape[1])]))
    known = tuple(table.histories[0].first(end).last(CONTEXT) for end in classic.ends)
    made = forecast_table(base, replace(table, histories=known), AHEAD, codec=Codec(1.0, precision))
    return [None if o.problem or np.isnan(o.paths[0]).any() else o.paths[0] for o in made.outlooks]


def _each(context: np.ndarray, fit: Callable) -> np.ndarray:
    # The matrices are tiny: threads that wait for one another would take most of the time.
    with threadpool_limits(1), warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")  # some fits do not converge; what they forecast counts all the same
        return np.stack([fit(variable).forecast(AHEAD) for variable in context.T], axis=1)
