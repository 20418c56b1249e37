"""Forecasts into a file: what may be written where is checked before anything is computed."""

from __future__ import annotations

import os
from pathlib import Path

import pandas as pd

from ..files import UserError, atomic_path, check_writable

TABLES = (".csv", ".parquet")
PICTURES = (".png", ".svg", ".pdf")


def refuse_output(out: Path, source: Path, kinds: tuple[str, ...] = TABLES, option: str = "--out") -> None:
    """Refuse a file that cannot be written, that is the input, or whose ending says nothing of its format.

    Raises
    ------
    UserError
    """
    if out.is_dir():
        raise UserError(f"{option} {out}: is a folder; give the name of a file")
    if out.exists() and not out.is_file():  # a device or a pipe, /dev/stdout: it gets CSV
        return
    if out.exists() and source.exists() and os.path.samefile(out, source):
        raise UserError(f"{option} {out}: is the input {source}; give another name")
    if out.suffix.lower() not in kinds:
        raise UserError(f"{option} {out}: unknown ending {out.suffix!r}; end it in {' or '.join(kinds)}")
    if out.suffix.lower() == ".parquet":
        try:
            import pyarrow  # noqa: F401
        except ImportError:
            raise UserError(f"{option} {out}: Parquet needs pyarrow; pip install pyarrow, or end it in .csv") from None
    check_writable(out)


def write_frame(frame: pd.DataFrame, out: Path) -> None:
    """Write a table as CSV or Parquet, by the ending of its name: all of it or nothing."""
    with atomic_path(out) as temporary:
        if out.suffix.lower() == ".parquet":
            frame.to_parquet(temporary, index=False)
        else:
            frame.to_csv(temporary, index=False)
