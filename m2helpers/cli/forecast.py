"""The commands on a user's own table: forecast it, or hold its last rows back and measure the forecast."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import arg

from ..files import UserError, atomic_path
from ..settings import default_model
from .options import Adapter, BaseOrRun, File, Flag, InputFile, OptionalFile, RunOrBase, load_target

if TYPE_CHECKING:
    from ..forecasting import Forecasts
    from ..series import Table

Name = Annotated[str | None, arg(metavar="NAME", help_behavior_hint="(default: recognised)")]
Names = Annotated[tuple[str, ...] | None, arg(help_behavior_hint="(default: all other columns)")]
Rows = Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: all that fit the model)")]
Decimal = Annotated[Literal[".", ","] | None, arg(help_behavior_hint="(default: recognised)")]
Levels = Annotated[tuple[str, ...] | None, arg(metavar="0.1,0.5,0.9", help_behavior_hint="")]


@dataclass(frozen=True, kw_only=True)
class _OwnTable:
    """What both commands are told of a table."""

    file: InputFile
    """CSV (or the like, compressed or not), Parquet, or HDF5 in the layout of the shipped data."""
    steps: int
    """Steps ahead."""
    time: Name = None
    """The column of times; none: rows are even steps."""
    columns: Names = None
    """The columns to forecast."""
    id: Name = None
    """The column that names the series."""
    header: Flag = False
    """The first line holds names, even if they look like numbers."""
    no_header: Flag = False
    """The first line holds values; with neither of the two, names are recognised."""
    last: Rows = None
    """Use only the last rows of each series."""
    decimal: Decimal = None
    """The sign before the decimals."""
    together: Flag = False
    """With more than three variables: write them as one text, not each by itself."""
    plot: OptionalFile = None
    """Draw a picture there: .png, .svg or .pdf."""
    seed: int = 0
    """Seed of the samples."""
    model: BaseOrRun = field(default_factory=default_model)
    run: RunOrBase = None
    adapter: Adapter = None

    def read(self) -> Table:
        """The table, once it is known that the picture can be written; what was read is told."""
        from ..series import read_table
        from ..series.writing import PICTURES, refuse_output

        if self.plot:
            refuse_output(self.plot, self.file, PICTURES, "--plot")
        if self.header and self.no_header:
            raise UserError("--header and --no-header say the opposite; give one of them")
        table = read_table(
            self.file,
            time=self.time,
            columns=self.columns,
            id=self.id,
            header=True if self.header else False if self.no_header else None,
            last=self.last,
            decimal=self.decimal,
        )
        _tell([table.notice])
        return table


@dataclass(frozen=True, kw_only=True)
class Forecast(_OwnTable):
    """Forecast your own series, from CSV, Parquet or HDF5."""

    samples: int = 0
    """Forecasts drawn at random for each series; 0: the likeliest one."""
    levels: Levels = None
    """Write these quantiles of the samples in place of the samples."""
    out: File
    """File to write: .csv or .parquet."""
    scale: Literal["own", "run"] = "own"
    """By each column itself, or as the run has it."""
    constrained: Flag = False
    """Write only what the grammar allows: all forecasts parse."""

    def __call__(self) -> None:
        from ..series.writing import refuse_output, write_frame

        refuse_output(self.out, self.file)
        levels = [_level(word) for word in self.levels or ()]
        if levels and not self.samples:
            raise UserError("--levels needs samples to take quantiles of; add --samples 20")
        if self.scale == "run" and self.run is None:
            raise UserError("--scale run: an untrained model has no scale; give --run, or leave --scale out")
        table = self.read()
        base, run, constrained = load_target(self.model, self.run, self.adapter, self.constrained)
        from ..forecasting import forecast_table, wide_frame

        made = forecast_table(
            base,
            table,
            self.steps,
            codec=run.codec if run else None,
            own_scale=self.scale == "own",
            constrained=constrained,
            samples=self.samples,
            seed=self.seed,
            together=self.together or None,
        )
        _tell(made.notices)
        write_frame(wide_frame(made, levels), self.out)
        if self.plot:
            _draw(made, self.plot)
        invalid = f"; {made.n_invalid} did not parse whole: with --constrained all do" if made.n_invalid else ""
        n = sum(not outlook.problem for outlook in made.outlooks)
        print(f"{self.out}: {n} series, {self.steps} steps ahead{invalid}")


@dataclass(frozen=True, kw_only=True)
class Backtest(_OwnTable):
    """Hold back the last rows of your own series, forecast them, and measure the error beside simple forecasts."""

    windows: Annotated[int, arg(metavar="K")] = 1
    """Windows of --steps rows to hold back, each forecast from all that comes before it."""
    samples: int = 20
    """Forecasts drawn at random for each window; 0: the likeliest one."""
    out: OptionalFile = None
    """Write the errors there as a table: .csv or .parquet."""

    def __call__(self) -> None:
        from ..series.writing import refuse_output, write_frame

        if self.out:
            refuse_output(self.out, self.file)
        table = self.read()
        base, run, _ = load_target(self.model, self.run, self.adapter, constrained=True)
        from ..evaluation.heldback import forecast_held_back, scores

        made = forecast_held_back(
            base,
            table,
            self.steps,
            self.windows,
            codec=run.codec if run else None,
            constrained=True,
            samples=self.samples,
            seed=self.seed,
            together=self.together or None,
        )
        _tell(made.notices)
        frame = scores(made)
        if self.out:
            write_frame(frame, self.out)
        if self.plot:
            _draw(made, self.plot)
        print(frame.to_string(index=False, float_format="{:.4g}".format, na_rep=""))


def _level(word: str) -> float:
    try:
        level = float(word)
    except ValueError:
        level = -1.0
    if not 0 < level < 1:
        raise UserError(f"--levels {word}: give quantiles between 0 and 1, such as 0.1,0.5,0.9")
    return level


def _tell(notices: Iterable[str]) -> None:
    for notice in notices:
        warnings.warn(notice, stacklevel=3)


def _draw(made: Forecasts, path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from ..report.plots import plot_own_forecast, use_style

    use_style()
    with atomic_path(path) as temporary:
        plot_own_forecast(made).savefig(temporary, format=path.suffix[1:].lower(), dpi=150)
