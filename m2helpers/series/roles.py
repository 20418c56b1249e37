"""What each column of a table is: the time, the names of several series, or a variable. Recognised and said, or asked about."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from ..files import UserError
from .cells import Grid
from .times import Times, find_rhythm, holds_dates, read_times

# A column with one of these names is a time whatever it holds ...
_TIME = set("time ds date datetime timestamp year years datum zeit zeitpunkt jahr fecha année annee año ano".split())
# ... and with one of these if it rises evenly: T may be a temperature.
_COUNTER = set(
    "t index step steps period day days week month quarter hour minute tag monat woche obs no nr n id row".split()
)
_ID = re.compile(r"id|.+[ _]id|series", re.IGNORECASE)
_ROWS_FOR_COUNTER = 5  # so many rows that rise evenly by chance are rare


@dataclass(frozen=True, eq=False)
class Roles:
    """Who is who."""

    variables: list[str]
    id: str | None
    labels: np.ndarray
    """Number of its series for each row, int (rows,), in the order in which they appear."""
    names: list[object]
    """The series' names, by that number; [0] where there is one series without a name."""
    time: str | None
    times: Times | None
    notes: list[str]


def assign(grid: Grid, time: str | None, columns: Sequence[str] | None, id: str | None) -> Roles:
    """Give every column a role: as said, else by what it holds and is called.

    Parameters
    ----------
    grid : Grid
    time, columns, id : optional
        What the user said; time "none" says that rows are even steps and no column is a time.

    Raises
    ------
    UserError
        If a column that was named is not there, or its role is unclear.
    """
    names, notes = list(grid.frame.columns), []
    for name in [*(columns or []), id, time if time != "none" else None]:
        if name is not None and name not in names:
            raise UserError(f"{grid.source}: has no column {name!r}, only {', '.join(names)}")
    taken = {name for name in [*(columns or []), id, time] if name is not None}
    free = [name for name in names if name not in taken]
    for name in list(free):
        if re.fullmatch(r"|variable_\d+", name) and not _filled(grid, name).any():
            free.remove(name)
            notes.append("a column without a name or a value left out")
    unsaid = [name for name in free if not _ID.fullmatch(name)]  # what they are is neither said nor their name
    if id is None:
        id = _find_id(grid, free, columns)
    labels, series = _labels(grid, id)
    free = [name for name in free if name != id]
    if time == "none":
        time, times = None, None
    elif time is not None:
        times = read_times(grid.frame[time], labels, named=True, where=f"{grid.source}, column {time}")
        if times is None:
            raise UserError(f"{grid.source}: column {time} holds no times, such as {grid.frame[time].iloc[0]!r}")
    else:
        time, times = _find_time(grid, free, labels, columns, notes)
    if id is None and times is not None and times.index.duplicated().any():
        id = _find_number_id(grid, [name for name in free if name != time], times)
        labels, series = _labels(grid, id)
    if id in unsaid and not _tells_apart(labels, times):
        if columns is None:
            raise UserError(
                f"{grid.source}: column {id} ({grid.frame[id].iloc[0]!r}, ...) may name several series, or say something of each "
                f"row; give --id {id}, or name the columns to forecast with --columns"
            )
        free, id = [*free, id], None
        labels, series = _labels(grid, id)
    left = [name for name in free if name not in (id, time)]
    if columns is None:
        variables = _variables(grid, left, time, notes)
    else:
        variables = list(columns)
        if left:
            notes.append(f"left out: {', '.join(left)}")
    if times is not None and times.about:
        notes.append(f"{time} read as {times.about}" if "first" in times.about else times.about)
    return Roles(variables, id, labels, series, None if times is None else time, times, notes)


def _filled(grid: Grid, name: str) -> np.ndarray:
    return (grid.frame[name].notna() & (grid.frame[name] != "")).to_numpy(bool)


def _is_text(grid: Grid, name: str) -> bool:
    """Whether a column holds names, not numbers with a slip among them."""
    cells = grid.frame[name]
    if cells.dtype.kind in "fiubM" or isinstance(cells.dtype, pd.PeriodDtype | pd.DatetimeTZDtype):
        return False
    filled = _filled(grid, name)
    return bool(filled.any() and np.isnan(grid.numbers(name))[filled].mean() > 0.5)


def _is_whole(grid: Grid, name: str) -> bool:
    numbers = grid.numbers(name)
    return bool(np.isfinite(numbers).all() and (numbers == np.round(numbers)).all())


def _find_id(grid: Grid, free: Sequence[str], columns: Sequence[str] | None) -> str | None:
    """The column of repeated names, if there is one."""
    texts = [name for name in free if _is_text(grid, name) and not holds_dates(grid.frame[name])]
    found = texts + [
        name
        for name in free
        if _ID.fullmatch(name)
        and len(grid.frame.columns) > 1
        and _is_whole(grid, name)
        and grid.frame[name].duplicated().any()
    ]
    if len(found) > 1:
        raise UserError(
            f"{grid.source}: columns {' and '.join(found)} may each name the series; "
            "say with --id which does, and with --columns which to forecast"
        )
    if texts and grid.frame[texts[0]].nunique() == len(grid.frame) > 1:
        if columns is not None:
            return None
        raise UserError(
            f"{grid.source}: {grid.place(0, texts[0])} is {grid.frame[texts[0]].iloc[0]!r}, neither a number nor a date, and no "
            "row shares its name; leave it out: name the columns to forecast with --columns"
        )
    return found[0] if found else None


def _find_number_id(grid: Grid, free: Sequence[str], times: Times) -> str | None:
    """A column of whole numbers that tells apart rows of the same time."""
    found = []
    for name in free:
        if _is_whole(grid, name):
            pairs = pd.DataFrame({"id": grid.numbers(name), "time": times.index})
            if not pairs.duplicated().any() and (pairs["id"].value_counts() > 2).all():
                found.append(name)
    return found[0] if len(found) == 1 else None


def _tells_apart(labels: np.ndarray, times: Times | None) -> bool:
    """Whether repeated names are those of series: they share times, or stand one below the other; the weather's do not."""
    if labels.max(initial=0) == 0:
        return True
    return times.index.has_duplicates if times is not None else np.count_nonzero(np.diff(labels)) == labels.max()


def _labels(grid: Grid, id: str | None) -> tuple[np.ndarray, list[object]]:
    if id is None:
        return np.zeros(len(grid.frame), int), [0]
    cells = grid.frame[id]
    missing = (cells.isna() | (cells == "")).to_numpy()
    if missing.any():
        raise UserError(
            f"{grid.source}: {grid.place(int(missing.argmax()), id)} is empty; every row needs its series' name"
        )
    labels, names = pd.factorize(cells)
    return labels, list(names)


def _find_time(
    grid: Grid, free: Sequence[str], labels: np.ndarray, columns: Sequence[str] | None, notes: list[str]
) -> tuple[str | None, Times | None]:
    """The column of times, if there is one: dates before numbers, and numbers only with a name that says so."""
    found: dict[str, Times] = {}
    counters: dict[str, Times] = {}
    for name in free:
        word = re.split(r"[\s(\[]", name.strip().casefold())[0]
        times = read_times(
            grid.frame[name], labels, named=word in _TIME | _COUNTER or not word, where=_where(grid, name)
        )
        dated = times is not None and isinstance(times.index, pd.DatetimeIndex)
        if times is not None and (dated or word in _TIME):
            found[name] = times
        elif times is not None and _rises(times, labels, evenly=not word):
            counters[name] = times
        elif times is None and name == free[0] and columns is None and _counts_up(grid, name) and len(free) > 1:
            numbers = grid.numbers(name)
            if not (numbers[0] >= 1500 and numbers[-1] <= 2200 and numbers[1] - numbers[0] == 1):
                raise UserError(
                    f"{grid.source}: column {name} rises evenly from {numbers[0]:g}: is it the time? "
                    f"Say so with --time {name}, or with --time none that it is to be forecast"
                )
            counters[name] = Times(pd.Index(numbers), lambda index: index.round().astype(np.int64))
    months = [name for name in free if name.strip().casefold() in ("month", "monat", "quarter", "day")]
    years = [name for name in found if name.strip().casefold() in ("year", "jahr")]
    if years and months and set(found) == set(years):
        both = " and ".join([years[0], *months])
        raise UserError(
            f"{grid.source}: {both} together are the time; put them into one column of dates, such as 2021-03"
        )
    choice = found or counters
    if len(choice) > 1:
        raise UserError(
            f"{grid.source}: columns {' and '.join(choice)} may each be the time; say which with --time, "
            "and with --columns which to forecast"
        )
    if not choice or (len(free) == 1 and not found and not columns):
        return None, None
    name, times = next(iter(choice.items()))
    if name == "" and not found and times.index[0] in (0, 1) and (np.diff(times.index) == 1).all():
        notes.append("row numbers left out")
        return name, None
    return name, times


def _rises(times: Times, labels: np.ndarray, evenly: bool) -> bool:
    """Whether numbers never fall within a series: uneven ones among them are refused later, not taken for a variable."""
    parts = [times.index[labels == label] for label in np.unique(labels)]
    if evenly:
        return all(find_rhythm(part) is not None for part in parts if len(part) > 1)
    return all(part.is_monotonic_increasing and part[-1] > part[0] for part in parts if len(part) > 1)


def _counts_up(grid: Grid, name: str) -> bool:
    """Whether a column rises evenly from the first row to the last."""
    numbers = pd.Index(grid.numbers(name))
    return len(numbers) >= _ROWS_FOR_COUNTER and find_rhythm(numbers) is not None


def _variables(grid: Grid, left: Sequence[str], time: str | None, notes: list[str]) -> list[str]:
    """What is left, but for numbers of rows beside a time."""
    variables: list[str] = []
    for name in left:
        word = name.strip().casefold()
        if word in _TIME:
            raise UserError(
                f"{grid.source}: column {name} may be a time too; name the columns to forecast with --columns"
            )
        if word in _COUNTER | {""} and time is not None and _counts_up(grid, name) and len(left) > 1:
            notes.append(f"{name or 'row numbers'} left out: it counts the rows")
        elif not word:
            raise UserError(
                f"{grid.source}: the first column has values and no name; name it, or name others with --columns"
            )
        else:
            variables.append(name)
            if word == "t":
                notes.append(f"{name} taken as a variable: it does not rise evenly (--time {name} if it is the time)")
    return variables


def _where(grid: Grid, name: str) -> str:
    return f"{grid.source}, column {name}"
