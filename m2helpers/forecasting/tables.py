"""Forecasts of a table, series by series, in its own units.

Every column has its own scale, and its own level where it moves little around a large one (`series.scaling`). Up to three
columns are forecast together, as the embedded base was trained; more are forecast apart, unless joined on purpose.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd

from ..files import UserError, read_json
from ..ledger import default_ledger
from ..models import Base
from ..series import History, Table
from ..series.scaling import Scaling, find_spike, fit_scaling
from ..text import Codec
from .distribution import Distribution
from .generation import forecast, sample_many

TOGETHER = 3  # variables that the embedded base has seen in one text
SHORTEST = 3  # steps of a history
ROWS = 160  # sampled at once


@dataclass(frozen=True, eq=False)
class Outlook:
    """The forecasts of one series."""

    history: History
    """What the model read of it."""
    index: pd.Index | None
    """Times of the steps ahead, as numbers or dates."""
    paths: np.ndarray
    """float64 (paths, steps, variables): the likeliest, or samples; NaN where a step did not parse."""
    truth: np.ndarray | None = None
    """What came, (steps, variables), where it was held back."""
    problem: str = ""
    """Why there is no forecast."""
    resolution: np.ndarray | float = 0.0
    """How far apart neighbouring numbers of the text are, (variables,), in the table's units; 0 where paths never were text."""
    level: np.ndarray | float = 0.0
    """The number that the text has as 0, (variables,)."""

    @property
    def distribution(self) -> Distribution:
        """Of the steps ahead: the paths, each value spread over the numbers that round to it."""
        points = 1e-9 * np.nanmax(np.abs(self.paths), initial=1e-300)  # as narrow as makes no difference
        spread = np.where(np.asarray(self.resolution) > 0, self.resolution, points)
        return Distribution.from_paths(self.paths, spread, self.level)

    @property
    def median(self) -> np.ndarray:
        """Of the samples, or the likeliest path itself, (steps, variables)."""
        return self.distribution.median if len(self.paths) > 1 else self.paths[0]

    @property
    def times(self) -> pd.Index | None:
        """Of the steps ahead, as the table has them."""
        return None if self.index is None else self.history.show(self.index)


@dataclass(frozen=True, eq=False)
class Forecasts:
    """The forecasts of a table."""

    table: Table
    outlooks: list[Outlook]
    notices: list[str] = field(default_factory=list)
    """One line each: histories that were cut, series that could not be forecast."""
    n_invalid: int = 0
    """Paths that did not parse whole."""


@dataclass(frozen=True, eq=False)
class _Job:
    """Some columns of one series, as the text has them."""

    outlook: int
    columns: list[int]
    codec: Codec
    scaling: Scaling | None
    values: np.ndarray


def forecast_table(
    base: Base,
    table: Table,
    steps: int,
    *,
    codec: Codec | None = None,
    own_scale: bool = True,
    together: bool | None = None,
    samples: int = 0,
    seed: int = 0,
    constrained: bool = False,
) -> Forecasts:
    """Forecast every series of a table by `steps`. (Nine parameters: how to write, how many paths, how to draw them.)

    Parameters
    ----------
    codec : Codec, optional
        Of a run; by default two decimals.
    own_scale : bool
        Scale each column by itself; False writes all with the codec's scale, joined, as in a run's own evaluation.
    together : bool, optional
        Write all columns into one text; by default up to three.
    samples : int
        Paths drawn for each series; 0 for the likeliest alone. Columns forecast apart are drawn apart.
    seed : int
        Of the samples.
    constrained : bool
        Write only what the grammar allows, as in `forecasting.generate`.

    Raises
    ------
    UserError
        If no series could be forecast, or fewer than one step is asked for.
    """
    if steps < 1:
        raise UserError(f"cannot forecast {steps} steps: ask for at least 1")
    codec = codec or Codec(1.0)
    variables = list(range(len(table.variables)))
    joined = not own_scale or (len(variables) <= TOGETHER if together is None else together)
    groups = [variables] if joined else [[column] for column in variables]
    outlooks: list[Outlook] = []
    jobs: list[_Job] = []
    notices: list[str] = []
    cut: dict[int, int] = {}  # steps of a history: steps used
    for number, history in enumerate(table.histories):
        problem, kept = _problem(table, history, own_scale), history
        if not problem:
            n = _fitting(base, codec, history.values, groups, steps, own_scale)
            problem = (
                ""
                if n >= SHORTEST
                else f"{steps} steps leave no room for the series in the model's text; ask for fewer"
            )
            kept = history.last(max(n, 1))
            cut |= {len(history.values): n} if 0 < n < len(history.values) else {}
        paths = np.full((max(samples, 1), steps, len(variables)), np.nan)
        index = history.rhythm.ahead(steps) if history.rhythm else None
        outlooks.append(Outlook(kept, index, paths, problem=problem))
        if not problem:
            scaling = fit_scaling(kept.values) if own_scale else None
            width = codec.resolution if scaling is None else replace(codec, scale=1.0).resolution / scaling.scale
            outlooks[-1] = replace(outlooks[-1], resolution=width, level=0.0 if scaling is None else scaling.level)
            jobs += [_Job(number, group, *_written(codec, scaling, kept.values, group)) for group in groups]
    if cut:
        rows, n = max(cut.items())
        each = " of each series" if len(table.histories) > 1 else ""
        notices.append(f"the last {n:,} of {rows:,} rows{each} are used, as many as the model was trained to read")
    how = {"constrained": constrained, "ledger": default_ledger(base)} | (
        {"n_samples": samples, "seed": seed, "temperature": 1.0, "batch_size": ROWS} if samples else {}
    )
    _run(base, jobs, outlooks, steps, how)
    return _finished(table, outlooks, notices)


def _problem(table: Table, history: History, own_scale: bool) -> str:
    if len(history.values) < SHORTEST:
        n = len(history.values)
        return f"{n} step{'s' * (n > 1)} {'are' if n > 1 else 'is'} too few to forecast from; give at least {SHORTEST}"
    spike = find_spike(history.values) if own_scale else None
    if spike is None:
        return ""
    row, column, times = spike
    line = row if history.lines is None else history.lines[row]
    later = len(history.values) - row - 1
    rest = f", or leave it out with --last {later}" if later >= SHORTEST else ""
    return (
        f"{table.counts} {line}, column {table.variables[column]}: {history.values[row, column]:g} is {times:,.0f} times "
        f"as far off as the rest; correct it{rest}"
    )


def _written(
    codec: Codec, scaling: Scaling | None, values: np.ndarray, columns: list[int]
) -> tuple[Codec, Scaling | None, np.ndarray]:
    """Some columns as the text has them, with the codec and the scaling that read them back."""
    if scaling is None:
        return codec, None, values[:, columns]
    return replace(codec, scale=1.0), scaling.of(columns), scaling.of(columns).write(values[:, columns])


def _fitting(base: Base, codec: Codec, values: np.ndarray, groups: list[list[int]], steps: int, own_scale: bool) -> int:
    """How many steps at the end of a series leave room for those to come; 0 if none do."""
    window = _window(base)
    n = int(min(len(values), window // min(codec.shortest_step(len(group)) for group in groups)))
    while n:
        scaling = fit_scaling(values[-n:]) if own_scale else None
        needed, longest = 0, 0
        for group in groups:
            code, _, numbers = _written(codec, scaling, values[-n:], group)
            text = code.encode(numbers)
            needed = max(needed, len(text))
            longest = max(longest, *(len(step) + 1 for step in text.split(code.step_separator)))
        room = window - steps * longest
        if needed <= room:
            return n
        n = max(0, min(n - 1, int(n * room / needed)))
    return 0


def _window(base: Base) -> float:
    """Tokens that a base reads well: beyond the length it was trained at, the embedded one writes no numbers at all.

    At 1,024 tokens, its error on long classic series is at its least; at 1,280 it is several times as large, at 2,048 nothing parses.
    """
    config = base.model.config
    window = getattr(config, "max_position_embeddings", math.inf)
    record = (
        Path(config.name_or_path or "/") / "pretraining.json"
    )  # beside the weights, where this package trained them
    if record.is_file():
        try:
            window = min(window, int(read_json(record)["settings"]["max_length"]))
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise UserError(
                f"{record}: does not say how long the texts of its training were ({error}); restore it"
            ) from None
    if window < 1:
        raise UserError(f"{config.name_or_path}: says it reads {window} tokens; restore its config.json")
    return window


def _run(base: Base, jobs: Sequence[_Job], outlooks: Sequence[Outlook], steps: int, how: dict) -> None:
    """Fill the outlooks' paths, those of texts alike all at once."""
    sampled = "n_samples" in how
    alike: dict[tuple, list[_Job]] = {}
    for job in jobs:
        apart = job.outlook if job.scaling is None else -1  # with a run's scale, each series as it always was
        alike.setdefault((apart, job.codec, len(job.columns)), []).append(job)
    for (_, codec, _), batch in alike.items():
        if sampled:
            drawn = sample_many(base, codec, [job.values for job in batch], steps, **how)
        else:
            made = forecast(base, codec, [job.values for job in batch], steps, **how)
            drawn = [one.values[np.newaxis] for one in made]
        for job, written in zip(batch, drawn, strict=True):
            values = written if job.scaling is None else job.scaling.read(written)
            paths = outlooks[job.outlook].paths
            for path, new in zip(paths, values, strict=False):  # fewer where some did not parse
                path[: len(new), job.columns] = new


def _finished(table: Table, outlooks: list[Outlook], notices: list[str]) -> Forecasts:
    """Name the series that came to nothing; refuse if all did."""
    n_invalid = sum(int(np.isnan(o.paths).any(axis=(1, 2)).sum()) for o in outlooks if not o.problem)
    for i, outlook in enumerate(outlooks):
        if not outlook.problem and np.isnan(outlook.paths).all():
            outlooks[i] = replace(outlook, problem="nothing that the model wrote parsed; --constrained makes it")
    dead = [outlook for outlook in outlooks if outlook.problem]

    def name(outlook: Outlook) -> str:
        return f"series {outlook.history.name}: " if len(outlooks) > 1 else ""

    if len(dead) == len(outlooks):
        more = f" (and {len(dead) - 1} more)" if len(dead) > 1 else ""
        raise UserError(f"{table.source}: nothing was forecast: {name(dead[0])}{dead[0].problem}{more}")
    notices += [f"{name(outlook)}{outlook.problem}" for outlook in dead]
    return Forecasts(table, outlooks, notices, n_invalid)
