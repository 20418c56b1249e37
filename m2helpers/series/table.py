"""A user's own table: series with their names and times, checked cell by cell; from CSV, Parquet, HDF5 or a DataFrame."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import h5py
import numpy as np
import pandas as pd

from ..data import open_hdf5, read_array, refuse_first, refuse_uneven_time
from ..files import UserError
from .cells import Grid, read_cells
from .roles import Roles, assign
from .times import Rhythm, find_rhythm, first_break, read_times

_CELLS = 50_000_000  # of Parquet: four gigabytes of them at most are in memory at once


@dataclass(frozen=True, eq=False)
class History:
    """One series of a table: what has been observed."""

    name: object
    """Its name, or its number where it has none."""
    values: np.ndarray
    """float64 (steps, variables), oldest first."""
    index: pd.Index | None = None
    """Its times as numbers or dates, (steps,); None where the table has none."""
    lines: np.ndarray | None = None
    """Where each step stands in the file, (steps,)."""
    rhythm: Rhythm | None = None
    """How the times of the whole series go on."""
    show: Callable[[pd.Index], pd.Index] = lambda index: index
    """Such times as the table has them: of its kind, in its spelling."""

    def first(self, n: int) -> History:
        """Its first `n` steps."""
        return self._cut(slice(n))

    def last(self, n: int) -> History:
        """Its last `n` steps."""
        return self._cut(slice(max(0, len(self.values) - n), None))

    def _cut(self, rows: slice) -> History:
        index = None if self.index is None else self.index[rows]
        return replace(
            self, values=self.values[rows], index=index, lines=None if self.lines is None else self.lines[rows]
        )


@dataclass(frozen=True, eq=False)
class Table:
    """What a file or a DataFrame holds."""

    source: str
    variables: tuple[str, ...]
    histories: tuple[History, ...]
    id_name: str | None
    time_name: str | None
    notice: str
    """One line on what was read, and as what."""
    counts: str = "line"
    """What `History.lines` counts."""

    def last(self, n: int) -> Table:
        """The table of each series' last `n` steps."""
        return replace(self, histories=tuple(history.last(n) for history in self.histories))


def read_table(
    path: str | os.PathLike,
    *,
    time: str | None = None,
    columns: Sequence[str] | None = None,
    id: str | None = None,
    header: bool | None = None,
    last: int | None = None,
    decimal: str | None = None,
) -> Table:
    """Read the user's own series, of any number of variables.

    Parameters
    ----------
    path : path-like
        Separated values (CSV and its like, compressed or not) or Parquet: one row a step, one column a variable, a column of times
        and one of series' names where there are any. HDF5: `/trajectories` (series, steps, variables) and, if there, `/time`.
    time : str, optional
        The column of times; "none": rows are even steps. Recognised if left out, like the others.
    columns : sequence of str, optional
        The variables.
    id : str, optional
        The column of series' names.
    header : bool, optional
        Whether the first line holds names.
    last : int, optional
        Use only so many steps at the end of each series.
    decimal : {".", ","}, optional

    Raises
    ------
    UserError
        If the file cannot be read, may be read in two ways, or holds a cell that is not a finite number, a time that stands twice,
        or a gap: one line that names line, column and cell.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if last is not None and last < 1:
        raise UserError(f"--last {last}: keep at least 1 row")
    if suffix in (".h5", ".hdf5") or (path.is_file() and h5py.is_hdf5(path)):
        if any(choice is not None for choice in (time, columns, id, header)):
            raise UserError(f"{path}: the columns of an HDF5 file have no names; leave --time, --columns and --id out")
        table = _read_hdf5(path)
    elif suffix in (".parquet", ".pq"):
        table = table_of(_read_parquet(path), str(path), time=time, columns=columns, id=id)
    else:
        table = _build(read_cells(path, header, decimal), time, columns, id)
    return replace(table.last(last), notice=f"{table.notice}; the last {last:,} used") if last else table


def table_of(
    frame: pd.DataFrame,
    source: str = "the table",
    *,
    time: str | None = None,
    columns: Sequence[str] | None = None,
    id: str | None = None,
) -> Table:
    """The series of a DataFrame: as `read_table`. An index of dates, or one with a name, counts as a column."""
    if isinstance(frame.index, pd.DatetimeIndex | pd.PeriodIndex) or any(
        name is not None for name in frame.index.names
    ):
        frame = frame.rename_axis(index=[name or "time" for name in frame.index.names]).reset_index()
    frame = frame.rename(columns=str).set_axis(pd.RangeIndex(1, len(frame) + 1))
    if frame.columns.duplicated().any():
        raise UserError(f"{source}: two columns are named {frame.columns[frame.columns.duplicated()][0]!r}; rename one")
    for name, column in frame.items():
        for row, cell in zip(frame.index, column if column.dtype == object else (), strict=False):
            if isinstance(cell, list | dict | tuple | set | bytes | np.ndarray):
                kind = type(cell).__name__
                raise UserError(
                    f"{source}: row {row}, column {name} holds a {kind}; give one number, time or name a cell"
                )
    texts = {
        name: object for name, kind in frame.dtypes.items() if isinstance(kind, pd.CategoricalDtype | pd.StringDtype)
    }
    return _build(Grid(source, frame.astype(texts), "row"), time, columns, id)


def read_series(path: str | os.PathLike) -> np.ndarray:
    """Read the user's own series, of any number of variables, for forecasting: the values of `read_table` alone.

    Parameters
    ----------
    path : path-like
        As for `read_table`. What was taken as time or names is told as a warning.

    Returns
    -------
    float64 array (series, steps, variables)
        Negative values are allowed.

    Raises
    ------
    UserError
        As `read_table`, and if the series differ in length.
    """
    table = read_table(path)
    if table.time_name is not None or table.id_name is not None:
        warnings.warn(table.notice, stacklevel=2)
    lengths = {len(history.values) for history in table.histories}
    if len(lengths) > 1:
        raise UserError(f"{path}: its series have {min(lengths)} to {max(lengths)} steps; read_table keeps them apart")
    return np.stack([history.values for history in table.histories])


# ---------------------------------------------------------------- files that are no text


def _read_hdf5(path: Path) -> Table:
    times, time = None, None
    with open_hdf5(path) as file:
        series = read_array(file, path, "trajectories", rank=3, layout="(series, steps, variables)").astype(np.float64)
        if "time" in file:
            time = read_array(file, path, "time", rank=1, layout="(steps,)").astype(np.float64)
    if 0 in series.shape:
        raise UserError(f"{path}: no value in it (series, steps, variables = {series.shape}); give at least one step")
    if time is not None:
        if len(time) != series.shape[1]:
            raise UserError(f"{path}: /trajectories has {series.shape[1]} steps, /time {len(time)}; they must agree")
        refuse_uneven_time(path, time)
        times = read_times(pd.Series(time), np.zeros(len(time), int), named=True, where=f"{path}, /time")
    refuse_first(path, series, ~np.isfinite(series), "every value must be a finite number, fill or drop it")
    timed = {} if times is None else dict(index=times.index, rhythm=find_rhythm(times.index), show=times.show)
    histories = tuple(History(i, values, **timed) for i, values in enumerate(series))
    names = tuple(f"variable_{i}" for i in range(series.shape[2]))
    name = None if times is None else "time"
    notice = _notice(histories, names, None, name, [])
    return Table(str(path), names, histories, None, name, notice, "step")


def _read_parquet(path: Path) -> pd.DataFrame:
    try:
        import pyarrow.parquet

        about = pyarrow.parquet.read_metadata(path)
        if about.num_rows * max(1, about.num_columns) > _CELLS:  # a few bytes can stand for any number of rows
            raise UserError(f"{path}: {about.num_rows:,} rows of {about.num_columns} columns are too many; cut it down")
        return pd.read_parquet(path)
    except (UserError, MemoryError):
        raise
    except ImportError:
        raise UserError(f"{path}: reading Parquet needs pyarrow; pip install pyarrow, or give CSV") from None
    except Exception as error:  # what pandas has noted in the file about its index may be anything
        reason = str(error).partition("\n")[0]
        raise UserError(f"{path}: cannot be read as Parquet ({reason}); give Parquet or CSV") from None


# ---------------------------------------------------------------- cells to series


def _build(grid: Grid, time: str | None, columns: Sequence[str] | None, id: str | None) -> Table:
    roles = assign(grid, time, columns, id)
    if grid.frame.empty or not roles.variables:
        raise UserError(f"{grid.source}: no value in it; give at least one row of numbers")
    values = np.stack([grid.numbers(name) for name in roles.variables], axis=1)  # (rows, variables)
    _refuse_cells(grid, values, roles.variables)
    if roles.time is not None and roles.times is not None and roles.times.index.hasnans:
        row = int(np.argmax(roles.times.index.isna()))
        raise UserError(
            f"{grid.source}: {grid.place(row, roles.time)} is {_cell(grid, row, roles.time)}, not a time; correct it"
        )
    notes = [*grid.notes, *roles.notes]
    lines = grid.frame.index.to_numpy()
    histories, is_sorted = [], True
    for label, name in enumerate(roles.names):
        rows = np.flatnonzero(roles.labels == label)
        timed = {}
        if roles.times is not None:
            index = roles.times.index[rows]
            order = np.argsort(index, kind="stable")
            is_sorted &= bool((order == np.arange(len(order))).all())
            rows, index = rows[order], index[order]
            rhythm = _rhythm(grid, roles, rows, index, roles.times.show(index))
            timed = dict(index=index, rhythm=rhythm, show=roles.times.show)
        histories.append(History(name, values[rows], lines=lines[rows], **timed))
    if not is_sorted:
        notes.append(f"rows sorted by {roles.time}")
    names = tuple(roles.variables)
    time_name = None if roles.time is None else roles.time or "time"
    notice = _notice(histories, names, roles.id, time_name, notes)
    return Table(grid.source, names, tuple(histories), roles.id, time_name, notice, grid.counts)


def _refuse_cells(grid: Grid, values: np.ndarray, names: Sequence[str]) -> None:
    bad = ~np.isfinite(values)
    if not bad.any():
        return
    row, column = (int(i) for i in np.argwhere(bad)[0])
    more = f" (and {bad.sum() - 1:,} more)" if bad.sum() > 1 else ""
    remedy = "every value must be a finite number: fill or drop that row, or leave the column out with --columns"
    cell = _cell(grid, row, names[column])
    raise UserError(f"{grid.source}: {grid.place(row, names[column])} is {cell}{more}; {remedy}")


def _cell(grid: Grid, row: int, name: str | None) -> str:
    cell = grid.frame[name].iloc[row]
    return "empty" if pd.isna(cell) or cell == "" else repr(cell) if isinstance(cell, str) else str(cell)


def _rhythm(grid: Grid, roles: Roles, rows: np.ndarray, index: pd.Index, shown: pd.Index) -> Rhythm | None:
    """The rhythm of one series' times; times that stand twice, and gaps, are refused by date and line."""
    lines = grid.frame.index[rows]
    whose = "" if roles.id is None else f" of series {roles.names[roles.labels[rows[0]]]}"
    if index.has_duplicates:
        twice = int(np.argmax(index.duplicated()))
        which = f"{shown[twice]} stands twice, in {grid.counts}s {lines[twice - 1]} and {lines[twice]}"
        tell = "drop one" + ("" if roles.id else ", or say with --id which column names the series")
        raise UserError(f"{grid.source}: column {roles.time}{whose}: {which}; {tell}")
    rhythm = find_rhythm(index)
    if rhythm is None and len(index) > 1:
        row, step, usual = first_break(index)
        where = f"from step {row} ({shown[row]}, {grid.counts} {lines[row]}) to the next ({shown[row + 1]})"
        dated = isinstance(index, pd.DatetimeIndex)
        kept = "" if dated else f", name {roles.time} in --columns if it is no time but to be forecast"
        raise UserError(
            f"{grid.source}: column {roles.time}{whose}: uneven time axis, {where} it goes by {step} and elsewhere by {usual}; "
            f"fill the gap{kept}, or take rows as even steps with --time none"
        )
    return rhythm


def _notice(
    histories: Sequence[History], variables: Sequence[str], id: str | None, time: str | None, notes: Sequence[str]
) -> str:
    parts = []
    if id is not None or len(histories) > 1:
        names = "" if id is None else " " + _listed([str(history.name) for history in histories]) + f" by {id}"
        parts.append(f"{len(histories)} series{names}")
    parts.append(f"{len(variables)} variable{'s' * (len(variables) != 1)} {_listed(variables)}")
    first = histories[0]
    if time is not None and first.index is not None:
        begin, end = (str(when).removesuffix(" 00:00:00") for when in first.show(first.index[[0, -1]]))
        span = f"{begin}{' to ' if isinstance(first.index, pd.DatetimeIndex) else '–'}{end}"
        rhythm = f" ({first.rhythm.name})" if first.rhythm else ""
        parts.append(f"{time} taken as time, {span}{rhythm}")
    lengths = [len(history.values) for history in histories]
    parts.append(f"{min(lengths):,}{f' to {max(lengths):,}' * (min(lengths) < max(lengths))} steps")
    return "; ".join([*parts, *notes])


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 6 else ", ".join([*names[:4], "…", names[-1]])
