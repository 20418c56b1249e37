"""Times of a table: how dates are spelt, the rhythm that they keep, and how it goes on.

A rhythm is exact arithmetic, found from the plainest reading on: whole months (their ends too), equal spans, a frequency that
pandas knows (business days), equal spans of absolute time where clocks are put forward and back.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from itertools import product

import numpy as np
import pandas as pd

from ..files import UserError

_DAYS = (
    "%Y-%m-%d|%Y/%m/%d|%d.%m.%Y|%d/%m/%Y|%m/%d/%Y|%d-%m-%Y|%m-%d-%Y|%d.%m.%y|%d/%m/%y|%m/%d/%y|%Y%m%d|"
    "%d %b %Y|%d %B %Y|%d. %B %Y|%b %d, %Y|%B %d, %Y|%d-%b-%Y|%d-%b-%y"
).split("|")
_CLOCKS = " %H:%M| %H:%M:%S| %H:%M:%S.%f| %I:%M %p| %I:%M:%S %p|T%H:%M|T%H:%M:%S|T%H:%M:%S.%f".split("|")
_MONTHS = "%Y-%m|%Y/%m|%m/%Y|%b %Y|%B %Y|%b-%Y|%b-%y".split("|")
_FORMATS = [*_DAYS, *map("".join, product(_DAYS, _CLOCKS, ("", "%z", " %z"))), *_MONTHS]
_QUARTER = re.compile(r"(\d{4})[- ]?Q([1-4])|Q([1-4])[-/ ]?(\d{4})", re.IGNORECASE)
_ZONE = re.compile(r"(Z|[+-]\d\d:?\d\d)$")
# Clocks whose changes are tried on local times without a zone, where nothing else makes them even.
_LOCAL = ("Europe/Berlin", "Europe/London", "Europe/Helsinki", "America/New_York", "Australia/Sydney")
EVEN = 1e-4  # of a step: times written as float32 are even to about 1e-5


@dataclass(frozen=True, eq=False)
class Times:
    """One reading of a column of times."""

    index: pd.Index
    """Numbers, or dates without a zone that can be counted on; NaN or NaT where a cell is no time."""
    show: Callable[[pd.Index], pd.Index]
    """Times like `index`, as the column has them: of its kind, in its spelling."""
    about: str = ""
    """What had to be decided to read it so."""


@dataclass(frozen=True, eq=False)
class Rhythm:
    """An even axis."""

    name: str
    """``daily``, ``every 0.5``."""
    ahead: Callable[[int], pd.Index]
    """The times of so many steps more."""


def read_times(column: pd.Series, groups: np.ndarray, *, named: bool, where: str) -> Times | None:
    """Read a column as times: dates of any common spelling, or (for columns named so) numbers.

    Of several readings, the first that is even in every group is taken. Two that are even and differ, day first and month
    first, are refused.

    Parameters
    ----------
    column : Series
        Text, numbers, dates or periods; cells that are no times are left to the caller.
    groups : int array (rows,)
        Which series each row belongs to.
    named : bool
        Whether its name says that it is a time: numbers count then.
    where : str
        File and column, for the error.

    Returns
    -------
    Times or None
        None where it holds no times.
    """
    readings = list(_readings(column, named))
    even = [reading for reading in readings if _is_even(reading.index, groups)]
    if not even and len(readings) == 1 and isinstance(readings[0].index, pd.DatetimeIndex):
        even = list(_with_clock_changes(readings[0], groups))
    found = even or readings
    spelt = {reading.about for reading in found}
    if len(spelt) > 1 and not all(reading.index.equals(found[0].index) for reading in found):
        raise UserError(f"{where}: {column.iloc[0]!r} may be {' or '.join(sorted(spelt))}; write dates as 2021-12-31")
    return found[0] if found else None


def holds_dates(column: pd.Series) -> bool:
    """Whether a column can be read as dates, in one spelling or another."""
    return next(_readings(column, False), None) is not None


def find_rhythm(index: pd.Index) -> Rhythm | None:
    """The rhythm of rising times; None where they are uneven or too few to tell."""
    if len(index) < 2 or index.hasnans:
        return None
    if not isinstance(index, pd.DatetimeIndex):
        gaps, usual = _gaps(index)
        step = (index[-1] - index[0]) / (len(index) - 1)
        if usual <= 0 or not (np.abs(gaps - usual) <= max(EVEN * usual, _rounding(index, step))).all():
            return None
        yearly = step == 1 and index[0] >= 1000 and index[-1] <= 2999
        ahead = lambda n: pd.Index(index[-1] + step * np.arange(1.0, n + 1))  # noqa: E731
        return Rhythm("yearly" if yearly else f"every {step:g}", ahead)
    return _monthly(index) or _spaced(index) or _frequency(index)


def first_break(index: pd.Index) -> tuple[int, str, str]:
    """Where uneven times first leave their usual step: the row before it, that step's length, the usual one."""
    gaps, usual = _gaps(index)
    apart = np.abs(gaps - usual) > EVEN * abs(usual) if usual else np.ones(len(gaps), bool)
    row = int(np.argmax(apart))
    if not isinstance(index, pd.DatetimeIndex):
        return row, f"{gaps[row]:g}", f"{usual:g}"
    if _is_monthly(index):
        return row, f"{gaps[row]:g} months", f"{usual:g} months"
    return row, _span(pd.Timedelta(gaps[row], "s")), _span(pd.Timedelta(usual, "s"))


# ---------------------------------------------------------------- spellings


def _readings(column: pd.Series, named: bool) -> Iterator[Times]:
    """Every reading of a column, those in which some cells are no times too, as long as most are."""
    kind = column.dtype
    if isinstance(kind, pd.PeriodDtype):
        yield Times(pd.DatetimeIndex(column.dt.to_timestamp()), lambda index: index.to_period(kind.freq))
    elif isinstance(kind, pd.DatetimeTZDtype):
        zone, index = kind.tz, pd.DatetimeIndex(column)
        shift = dict(nonexistent="shift_forward", ambiguous=False)
        yield Times(index.tz_localize(None), lambda index: index.tz_localize(zone, **shift))
        yield Times(index.tz_convert(None), lambda index: index.tz_localize("UTC").tz_convert(zone))
    elif kind.kind == "M":
        yield Times(pd.DatetimeIndex(column), lambda index: index)
    elif pd.api.types.is_numeric_dtype(kind):
        if named and kind.kind != "b":
            yield _counted(column.to_numpy(np.float64, na_value=np.nan))
    elif all(isinstance(cell, str) for cell in column):
        yield from _spelt(column, named)
    elif len(column) and all(hasattr(cell, "year") for cell in column.dropna()):  # dates of Python's own
        yield Times(pd.DatetimeIndex(pd.to_datetime(column, errors="coerce")), lambda index: pd.Index(index.date))


def _spelt(column: pd.Series, named: bool) -> Iterator[Times]:
    if named:
        numbers = pd.to_numeric(column, errors="coerce").to_numpy(np.float64)
        dated = column.str.fullmatch(r"[12]\d{3}[01]\d[0-3]\d").all()  # 20210131
        if np.isfinite(numbers).mean() > 0.5 and not dated:
            yield _counted(numbers)
            return
    quarters = [_QUARTER.fullmatch(cell) for cell in column]
    if quarters and all(quarters):
        starts = [f"{m[1] or m[4]}Q{m[2] or m[3]}" for m in quarters if m]
        spelling = re.sub(r"(?<=Q)\d", "%q", re.sub(r"\d{4}", "%Y", column.iloc[0].upper()))
        index = pd.PeriodIndex(starts, freq="Q").to_timestamp()
        yield Times(index, lambda index: index.to_period("Q").strftime(spelling))
    samples = [cell for cell in column.iloc[:50] if cell][:3]
    formats = [form for form in _FORMATS if any(_matches(cell, form) for cell in samples)]
    if not named:
        formats = [form for form in formats if not form.startswith("%Y%m%d")]  # it is a number as well
    for form in formats:
        index = pd.DatetimeIndex(pd.to_datetime(column, format=form, errors="coerce", utc="%z" in form))
        if index.notna().mean() > 0.5 and not (index.hasnans and len(formats) > 1 and not _best(column, form, formats)):
            yield from _zoned(column, index, form) if "%z" in form else [_dated(index, form)]


def _best(column: pd.Series, form: str, formats: list[str]) -> bool:
    """Whether no other spelling reads more of the cells."""
    read = {f: pd.to_datetime(column, format=f, errors="coerce", utc=True).notna().sum() for f in formats}
    return read[form] == max(read.values())


def _matches(cell: str, form: str) -> bool:
    try:
        datetime.strptime(cell, form)
    except ValueError:
        return False
    return True


def _dated(index: pd.DatetimeIndex, form: str) -> Times:
    first = {"%d": "day first", "%m": "month first"}.get(form[:2], "") if "%d" in form and "%m" in form else ""
    return Times(index, lambda index: index.strftime(form), first if form[2] in "/-" else "")


def _zoned(column: pd.Series, instants: pd.DatetimeIndex, form: str) -> Iterator[Times]:
    """Local times with an offset: read off the clock where that is even (days), else as instants."""
    zones = column.str.extract(_ZONE)[0]
    last = zones.dropna().iloc[-1]
    offsets = pd.to_timedelta([_offset(zone) for zone in zones])
    show = lambda index: index.strftime(form.replace("%z", "")) + last  # noqa: E731
    clock = instants.tz_localize(None)
    days = clock + offsets
    if (offsets == offsets[-1]).all() or find_rhythm(days.sort_values()) is not None:
        yield Times(days, show)
    else:
        yield Times(clock + offsets[-1], show)


def _offset(zone: str | float) -> str | None:
    if not isinstance(zone, str):
        return None
    return "00:00:00" if zone == "Z" else f"{zone[:3]}:{zone[-2:]}:00"


def _counted(numbers: np.ndarray) -> Times:
    whole = (numbers == np.round(numbers))[np.isfinite(numbers)].all()
    show = (lambda index: index.round().astype(np.int64)) if whole else _shortened
    return Times(pd.Index(numbers), show)


def _shortened(index: pd.Index) -> pd.Index:
    return pd.Index([float(f"{x:.9g}") for x in index])


# ---------------------------------------------------------------- rhythms


def _is_even(index: pd.Index, groups: np.ndarray) -> bool:
    if index.hasnans:
        return False
    series = [index[groups == group].sort_values() for group in np.unique(groups)]
    return all(find_rhythm(times) is not None for times in series if len(times) > 1)


def _with_clock_changes(reading: Times, groups: np.ndarray) -> Iterator[Times]:
    """Local times that are even once their clock's changes are allowed for: an hour missing in spring, twice in autumn."""
    for zone in _LOCAL:
        try:
            local = reading.index.tz_localize(zone, ambiguous="infer")
        except (ValueError, TypeError):  # pandas' own errors of ambiguous and missing times are ValueErrors
            continue
        instants = local.tz_convert(None)
        if _is_even(instants, groups):

            def show(index: pd.Index, zone: str = zone) -> pd.Index:
                return reading.show(index.tz_localize("UTC").tz_convert(zone).tz_localize(None))

            yield Times(instants, show, f"clock changes as in {zone}")
            return


def _is_monthly(index: pd.DatetimeIndex) -> bool:
    """Whether all stand on one day of the month (or on its last day), at one time of day."""
    day = 31 if index.is_month_end.all() else index.day.max()
    return bool(
        (index.day == np.minimum(day, index.days_in_month)).all() and (index - index.normalize()).nunique() == 1
    )


def _monthly(index: pd.DatetimeIndex) -> Rhythm | None:
    months = np.diff(index.year * 12 + index.month)
    if not _is_monthly(index) or months[0] < 1 or (months != months[0]).any():
        return None
    step, clock = int(months[0]), index[0] - index[0].normalize()
    day = 31 if index.is_month_end.all() else index.day.max()

    def ahead(n: int) -> pd.Index:
        last = index[-1].to_period("M")
        firsts = pd.PeriodIndex([last + step * i for i in range(1, n + 1)]).to_timestamp()
        return firsts + pd.to_timedelta(np.minimum(day, firsts.days_in_month) - 1, "D") + clock

    return Rhythm({1: "monthly", 3: "quarterly", 12: "yearly"}.get(step, f"every {step} months"), ahead)


def _spaced(index: pd.DatetimeIndex) -> Rhythm | None:
    steps = np.unique(np.diff(index))
    if len(steps) != 1 or not steps[0] > np.timedelta64(0):
        return None
    step = pd.Timedelta(steps[0])
    names = {pd.Timedelta(days=1): "daily", pd.Timedelta(days=7): "weekly", pd.Timedelta(hours=1): "hourly"}
    ahead = lambda n: pd.DatetimeIndex([index[-1] + step * i for i in range(1, n + 1)])  # noqa: E731
    return Rhythm(names.get(step, f"every {_span(step)}"), ahead)


def _frequency(index: pd.DatetimeIndex) -> Rhythm | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pandas announces that it will return an offset
        frequency = pd.infer_freq(index) if len(index) > 2 and index.is_unique else None
    if frequency is None or not pd.date_range(index[0], periods=len(index), freq=frequency).equals(index):
        return None
    name = pd.tseries.frequencies.to_offset(frequency).freqstr
    name = "business days" if name == "B" else f"frequency {name}"
    return Rhythm(name, lambda n: pd.date_range(index[-1], periods=n + 1, freq=frequency)[1:])


def _rounding(index: pd.Index, step: float) -> float:
    """How far steps may differ by rounding alone: years written as 1900.083, 1900.167; 0 where that says nothing."""
    values = index.to_numpy(np.float64)
    unit = next((10.0**-k for k in range(1, 7) if (np.abs(values - values.round(k)) < 1e-9).all()), 0.0)
    return 1.01 * unit if unit < 0.02 * step else 0.0


def _gaps(index: pd.Index) -> tuple[np.ndarray, float]:
    """Steps between times, in months or seconds for dates, and the usual one: the median, for dates the most frequent."""
    if not isinstance(index, pd.DatetimeIndex):
        gaps = np.diff(index.to_numpy(np.float64))
        return gaps, float(np.median(gaps))
    gaps = np.diff(index.year * 12 + index.month) if _is_monthly(index) else np.diff(index) / np.timedelta64(1, "s")
    values, counts = np.unique(gaps, return_counts=True)
    return gaps.astype(np.float64), float(values[counts.argmax()])


def _span(step: pd.Timedelta) -> str:
    """``1 day``, ``15 min``, ``1 h 30 min``."""
    parts = step.components
    named = ((parts.days, "day" if parts.days == 1 else "days"), (parts.hours, "h"), (parts.minutes, "min"))
    seconds = step.seconds % 60 + step.microseconds / 1e6
    return " ".join([f"{n} {unit}" for n, unit in named if n] + ([f"{seconds:g} s"] if seconds else [])) or "0 s"
