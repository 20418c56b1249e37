"""A file of text, cut into cells: compression, encoding, separator, comments, header.

Nothing is guessed in silence: what had to be decided is noted, and what may mean two things is refused.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import lzma
import re
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mode

import numpy as np
import pandas as pd

from ..files import UserError, read_at_most

_NUMBER = re.compile(r"[+-]?(\d+([.,]\d*)?|[.,]\d+)(e[+-]?\d+)?|[+-]?(inf|infinity|nan)", re.IGNORECASE)
_DATE = re.compile(r"\d{1,4}[-/.]\d{1,2}([-/.]\d{1,4})?([ T].*)?")
_WITH_COMMA = re.compile(r"[+-]?[\d.]*,[\d.,]*(e[+-]?\d+)?", re.IGNORECASE)
_MARKS = (
    (b"\xef\xbb\xbf", "utf-8-sig"),
    (b"\xff\xfe\x00\x00", "utf-32"),
    (b"\xff\xfe", "utf-16"),
    (b"\xfe\xff", "utf-16"),
)
_MEMORY = 1 << 32  # bytes that a table may take while it is read, at about so many a line and a cell:
_LINE, _CELL = 300, 120


@dataclass(frozen=True, eq=False)
class Grid:
    """A table before its columns have roles."""

    source: str
    """The file, for errors."""
    frame: pd.DataFrame
    """Cells by column name: text, or what a DataFrame holds. Its index counts lines of the file, or rows from 1."""
    counts: str = "line"
    """What the index counts."""
    decimal: str = "."
    notes: list[str] = field(default_factory=list)

    def numbers(self, name: str) -> np.ndarray:
        """A column as float64 (rows,), NaN where a cell is no number."""
        cells = self.frame[name]
        if cells.dtype.kind in "fiu":
            return cells.to_numpy(np.float64, na_value=np.nan)
        if self.decimal == ",":
            cells = cells.str.replace(",", ".", regex=False)
        return pd.to_numeric(cells, errors="coerce").to_numpy(np.float64, na_value=np.nan)

    def place(self, row: int, name: str) -> str:
        """Where a cell stands, for errors: ``line 3, column b``."""
        return f"{self.counts} {self.frame.index[row]}, column {name}"


def read_cells(path: Path, header: bool | None = None, decimal: str | None = None) -> Grid:
    """Cut a file of separated values into cells.

    Parameters
    ----------
    path : Path
        Plain, or compressed by gzip, bzip2, xz or zip.
    header : bool, optional
        Whether the first line holds names; found out if None.
    decimal : {".", ","}, optional
        Found out if None.

    Raises
    ------
    UserError
        If it is no such file, or may be read in two ways.
    """
    text, notes = _decoded(path, _unpacked(path))
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    first, comments, separator = 0, [], ""
    for first, line in enumerate(map(str.strip, lines)):  # noqa: B007 (what stands before the table)
        if line.startswith("#"):
            comments.append(line.lstrip("# "))
        elif line.lower().startswith("sep=") and len(line) == 5:  # Excel's own mark
            separator = line[-1]
        elif line:
            break
    if comments:
        notes.append(f"{len(comments)} comment line{'s' * (len(comments) > 1)} skipped")
    try:
        separator = separator or _separator(lines[first:])
        _refuse_large(path, lines, separator)
        rows = _rows(path, lines, first, separator)
    except csv.Error as error:
        raise UserError(_unreadable(path, str(error))) from None
    if not rows:
        raise UserError(_unreadable(path, "No columns: the file is empty"))
    named = _has_header(path, rows, notes) if header is None else header
    names, rows = (rows[0][1], rows[1:]) if named else ([], rows)
    if not named and rows and comments and len(guess := _split([comments[-1]], separator)[0][1]) == len(rows[0][1]):
        names = guess  # as numpy.savetxt writes a header
        notes.append("names taken from the comment line")
    if not named and separator == "," and decimal is None:
        _refuse_decimal_commas(path, rows)
    width = len(rows[0][1]) if rows else len(names)
    names = _unique(path, names + [""] * (width - len(names)))
    index = pd.Index([line for line, _ in rows])
    frame = pd.DataFrame([cells for _, cells in rows], index=index, columns=names, dtype=object)
    return Grid(str(path), frame, "line", decimal or _decimal(path, frame), notes)


# ---------------------------------------------------------------- bytes to text


def _unpacked(path: Path) -> bytes:
    """A file's bytes, or those of the one file in an archive; not more of them than a table may have."""
    try:
        data = read_at_most(path)
        if data.startswith(b"PK\x03\x04"):
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                inside = [name for name in archive.namelist() if not name.endswith("/") and "__MACOSX" not in name]
                if any(name.startswith(("xl/", "content.xml")) for name in inside):
                    raise UserError(f"{path}: is a spreadsheet; save the sheet as CSV")
                if len(inside) != 1:
                    raise UserError(
                        f"{path}: holds {len(inside)} files; give an archive of one table, or the table itself"
                    )
                with archive.open(inside[0]) as member:
                    return read_at_most(path, member)
        packed = io.BytesIO(data)
        if data.startswith(b"\x1f\x8b"):
            return read_at_most(path, gzip.GzipFile(fileobj=packed))
        if data.startswith(b"BZh"):
            return read_at_most(path, bz2.BZ2File(packed))
        if data.startswith(b"\xfd7zXZ"):
            return read_at_most(path, lzma.LZMAFile(packed))
        return data
    except UserError:
        raise
    except OSError as error:
        raise UserError(_unreadable(path, error.strerror or str(error))) from None
    except (EOFError, zipfile.BadZipFile, lzma.LZMAError, zlib.error, RuntimeError, ValueError) as error:
        raise UserError(_unreadable(path, f"damaged archive: {error}")) from None


def _refuse_large(path: Path, lines: Sequence[str], separator: str) -> None:
    """Refuse a table that would take more memory than it may, before it is taken."""
    cells = len(lines) + sum(line.count(separator) for line in lines)
    if len(lines) * _LINE + cells * _CELL > _MEMORY:
        raise UserError(
            f"{path}: {cells:,} cells in {len(lines):,} lines are too many to read; cut it down, or give Parquet"
        )


def _decoded(path: Path, data: bytes) -> tuple[str, list[str]]:
    encoding = next((name for mark, name in _MARKS if data.startswith(mark)), None)
    if encoding is None and b"\x00" in data:
        raise UserError(_unreadable(path, "it is no text"))
    try:
        return data.decode(encoding or "utf-8"), []
    except UnicodeDecodeError as error:
        if encoding:
            raise UserError(
                _unreadable(path, f"not {encoding.upper()} as its first bytes say, {error.reason}")
            ) from None
    text = data.decode("cp1252", errors="replace")  # figures are the same in every such encoding
    return text, ["not UTF-8, read as Windows-1252"]


def _unreadable(path: Path, reason: str) -> str:
    return f"{path}: cannot be read as CSV ({reason}); give comma-separated text or HDF5"


# ---------------------------------------------------------------- text to cells


def _split(lines: Sequence[str], separator: str) -> list[tuple[int, list[str]]]:
    """Cells of each row, and the line on which it begins, counted from 0."""
    if separator == " ":
        return [(number, re.findall(r"[^ \t]+", line)) for number, line in enumerate(lines)]  # no hard space: thousands
    reader, rows, begins = (
        csv.reader([line + "\n" for line in lines], delimiter=separator, skipinitialspace=True),
        [],
        0,
    )
    for cells in reader:
        rows.append((begins, [cell.strip() for cell in cells]))
        begins = reader.line_num
    return rows


def _separator(lines: Sequence[str]) -> str:
    """The first of tab, semicolon, bar, comma and white space that cuts the lines up; a comma where none does."""
    sample = [line for line in lines if line.strip()][:100]
    for separator, enough in (("\t", 0.5), (";", 0.5), ("|", 0.5), (",", 0.5), (" ", 0.8)):
        counts = [len(cells) for _, cells in _split(sample, separator)]
        if counts and np.mean(np.array(counts) > 1) >= enough:
            return separator
    return ","


def _rows(path: Path, lines: Sequence[str], first: int, separator: str) -> list[tuple[int, list[str]]]:
    """Rows of one width with the lines they stand on; blank ones at the end left out, short ones filled with nothing."""
    rows = [(first + line + 1, cells) for line, cells in _split(lines[first:], separator)]
    while rows and not any(rows[-1][1]):
        rows.pop()
    if not rows:
        return []
    width, rest = len(rows[0][1]), [len(cells) for _, cells in rows[1:] if any(cells)]
    halves = [cell for _, cells in rows[1:] for cell in cells]
    if separator == "," and width == 1 and set(rest) == {2} and all(re.fullmatch(r"[+-]?\d+", half) for half in halves):
        # one column of decimal commas under its name
        return [(line, [",".join(cells)]) for line, cells in rows]
    if separator in " \t" and rest and mode(rest) == width + 1 and not any(map(_NUMBER.fullmatch, rows[0][1])):
        if len({cells[0] for _, cells in rows[1:] if cells}) < len(rest):
            raise UserError(_unreadable(path, f"Expected {width} fields in line {rows[1][0]}, saw {width + 1}"))
        rows[0][1].insert(0, "")  # as R writes row names
        width += 1
    for line, cells in rows:
        if any(cells[width:]):
            hint = "; delete lines above the names of columns" if width == 1 else ""
            hint = hint or ("; if its commas are decimal, separate the columns by ;" if separator == "," else "")
            raise UserError(_unreadable(path, f"Expected {width} fields in line {line}, saw {len(cells)}{hint}"))
    return [(line, (cells + [""] * width)[:width]) for line, cells in rows]


def _unique(path: Path, names: Sequence[str]) -> list[str]:
    names = ["" if re.fullmatch(r"Unnamed: \d+", name) else " ".join(name.split()) for name in names]
    for name in names:
        if name and names.count(name) > 1:
            raise UserError(f"{path}: two columns are named {name!r}; rename one")
    unnamed = lambda i: "" if i == 0 and any(names) else f"variable_{i}"  # noqa: E731
    return [name or unnamed(i) for i, name in enumerate(names)]


# ---------------------------------------------------------------- header and decimals


def _kind(cell: str) -> str:
    if not cell:
        return ""
    return "number" if _NUMBER.fullmatch(cell) else "date" if _DATE.fullmatch(cell) else "text"


def _has_header(path: Path, rows: Sequence[tuple[int, list[str]]], notes: list[str]) -> bool:
    """Whether the first row holds names: text above numbers, or whole numbers that count on and do not fit what is below."""
    first, rest = rows[0][1], [cells for _, cells in rows[1:200]]
    kinds = [_kind(cell) for cell in first]
    if "text" in kinds:
        below = [mode([_kind(cells[i]) for cells in rest] or ["number"]) for i in range(len(first))]
        pairs = list(zip(kinds, below, strict=True))
        as_names = any(kind == "text" and other != "text" for kind, other in pairs)
        as_data = any(kind in ("number", "date") and kind == other for kind, other in pairs)
        if (
            as_names
            and as_data
            and not _counts_on([cell for cell, kind in zip(first, kinds, strict=True) if kind == "number"])
        ):
            raise UserError(f"{path}: is line {rows[0][0]} ({', '.join(first)[:60]}) names or data? {_EITHER}")
        return as_names or not as_data
    if not first[0] and first[1:] == [str(i) for i in range(len(first) - 1)] and len(first) > 1:
        return True  # as pandas writes columns without names
    if len(rest) < 3 or not all(re.fullmatch(r"\d+", cell) for cell in first):
        return False
    columns = list(zip(*rest, strict=True))
    fractions = all(all(re.search(r"[.,]\d|e-", cell) for cell in column if cell) for column in columns)
    outside = all(_outside(float(cell), column) for cell, column in zip(first, columns, strict=True))
    if len(first) > 1 and _counts_on(first) and (fractions or outside):
        notes.append(f"first line {', '.join(first)[:60]} taken as names (--no-header if it is data)")
        return True
    if fractions and outside:
        raise UserError(f"{path}: is line {rows[0][0]} ({', '.join(first)[:60]}) names or data? {_EITHER}")
    return False


_EITHER = "say which with --header or --no-header"


def _counts_on(cells: Sequence[str]) -> bool:
    """Whether cells are whole numbers in a row, such as the years 2019, 2020."""
    return all(re.fullmatch(r"\d+", cell) for cell in cells) and set(np.diff([int(cell) for cell in cells])) <= {1}


def _outside(value: float, column: Sequence[str]) -> bool:
    numbers = pd.to_numeric(pd.Series(column).str.replace(",", "."), errors="coerce").dropna()
    return bool(len(numbers) and abs(value - numbers.median()) > 2 * max(np.ptp(numbers), 1e-12))


def _refuse_decimal_commas(path: Path, rows: Sequence[tuple[int, list[str]]]) -> None:
    """Refuse lines such as 20,05 without a header: two whole numbers, or one with a decimal comma?"""
    whole = all(re.fullmatch(r"[+-]?\d+", cell) for _, cells in rows for cell in cells)
    if not whole or len(rows[0][1]) % 2:
        return
    seconds = [cell for _, cells in rows for cell in cells[1::2]]
    pair = len(rows[0][1]) == 2 and len({len(cell) for cell in seconds}) == 1 and seconds[0].isdigit()
    if pair or any(re.fullmatch(r"0\d+", cell) for cell in seconds):
        line, cells = rows[0]
        raise UserError(
            f"{path}: line {line} ({','.join(cells)}) may be {len(cells)} columns or decimal commas; "
            "give it a line of names, or separate columns by ; or write decimal points"
        )


def _decimal(path: Path, frame: pd.DataFrame) -> str:
    """The decimal mark of all numbers; separators of thousands are refused, and so is what may be either."""
    cells = frame.to_numpy().ravel()
    found = [i for i, cell in enumerate(cells) if "," in cell and _WITH_COMMA.fullmatch(cell)]
    if not found:
        return "."
    place = lambda i: f"{path}: line {frame.index[i // frame.shape[1]]}, column {frame.columns[i % frame.shape[1]]}"  # noqa: E731
    for i in found:
        if cells[i].count(",") > 1 or "." in cells[i]:
            raise UserError(f"{place(i)} is {cells[i]!r}; write numbers without separators of thousands")
    pointed = next((i for i, cell in enumerate(cells) if re.fullmatch(r"[+-]?\d*\.\d+", cell)), None)
    if pointed is not None:
        raise UserError(f"{place(found[0])} is {cells[found[0]]!r}, and {cells[pointed]!r} has a point; use one mark")
    if all(re.fullmatch(r"[+-]?[1-9]\d{0,2},\d{3}", cells[i]) for i in found):
        raise UserError(
            f"{place(found[0])} is {cells[found[0]]!r}: thousands or a decimal comma? Say with --decimal , or write a point"
        )
    return ","
