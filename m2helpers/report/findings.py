"""What the records of the sweeps, the ablations and the seeds say: tables, and advice whose every figure is read from them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from ..evaluation.protocols import P5_CONTEXTS
from ..evaluation.scores import from_json, origins
from ..experiments.planning import ABLATION, AS_PUBLISHED, FINAL_STAGES, Plan, plan_of
from ..experiments.runner import sweep_table
from ..files import read_json
from ..paths import checkpoint_folder

NO_FORECAST = "no valid forecast"


def figure(value: float, digits: int = 4) -> str:
    """A number of so many digits as people write it: 2.5e14, 6.9e-5, 0.031."""
    return re.sub(r"e\+?(-?)0*", r"e\1", f"{value:.{digits}g}")


def markdown_header(*names: str) -> list[str]:
    """The first two lines of a table in Markdown."""
    return [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]


def seed_records(folder: Path, stage: str) -> list[list[dict]]:
    """The measurements of a stage in a base's folder: of its first seed, and of every other of the same base on the same data."""
    paths = [*folder.glob(f"{stage}/metrics.json"), *sorted(folder.glob(f"{stage}-seed*/metrics.json"))]
    records = [read_json(path) for path in paths]
    return [rows for rows in records if origins(rows) == origins(records[0])]


def seeds_table(base: str = "embedded") -> str:
    """P5 errors of the long runs over their seeds in Markdown: the mean, and of several the smallest and the largest."""
    lines = markdown_header("run", "error", "seeds", *(f"S = {s}" for s in P5_CONTEXTS))
    for stage in FINAL_STAGES:
        records = seed_records(checkpoint_folder(base), stage)
        test = [[r for r in from_json(rows) if (r.protocol, r.split) == ("P5", "test")] for rows in records]
        runs = [{r.context: r for r in rows} for rows in test if len(rows) == len(P5_CONTEXTS)]
        for measure, shown in (("mae", "{:.4f}".format), ("mse", lambda error: figure(error, 3))) if runs else ():
            cells = []
            for results in zip(*([run[s] for s in P5_CONTEXTS] for run in runs), strict=True):
                errors = [getattr(result, measure) for result in results]
                known = [error for error in errors if error is not None]  # none where no forecast was valid
                spread = f" ({shown(min(known))}–{shown(max(known))})" if len(known) > 1 else ""  # one seed has none
                cells.append(f"{shown(float(np.mean(known)))}{spread}" if known else NO_FORECAST)
            lines.append(f"| {stage} | {measure.upper()} | {len(runs)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def sweeps_table(base: str = "embedded") -> str:
    """Every run of the sweeps in Markdown, the least validation loss first."""
    table = sweep_table(checkpoint_folder(base))
    if table.empty:
        return "No sweep has been recorded for this base."
    names = ["learning_rate", "lora_r", "max_length", "precision", "max_steps", "val_loss", *_errors(table)]
    return _rows(table.sort_values("val_loss"), names)


def ablations_table(base: str = "embedded") -> str:
    """Every change to the final setting in Markdown: its losses and errors beside those of the published setting."""
    table = sweep_table(checkpoint_folder(base), ABLATION)
    if table.empty:
        return "No ablation has been recorded for this base."
    table["change"] = table["run"].map(_in_words)
    return _rows(
        table.sort_values("val_loss"), ["change", "learning_rate", "max_steps", "val_loss", *_errors(table), "flops"]
    )


def grid_losses(base: str = "embedded") -> pd.DataFrame:
    """Least validation loss of the grid's runs: one row a rank, one column a learning rate, NaN where there was none."""
    plan, table = plan_of(base), sweep_table(checkpoint_folder(base))
    if table.empty:
        return table
    grid = table[(table["max_length"] == plan.initial.max_length) & (table["precision"] == plan.initial.precision)]
    return grid.pivot_table("val_loss", "lora_r", "learning_rate").sort_index(ascending=False)


def advice(base: str = "embedded") -> str:
    """Recommendations for a tight budget in Markdown, as far as there are records to tie them to."""
    grid = grid_losses(base)
    if grid.empty:
        return "No sweep has been recorded for this base."
    folder, plan = checkpoint_folder(base), plan_of(base)
    points = [
        *_on_the_grid(grid),
        *_on_the_length(folder, plan),
        *_on_the_changes(folder, plan),
        *_on_the_steps(folder),
    ]
    return "\n".join(f"{number}. {point}" for number, point in enumerate(points, 1))


def _on_the_grid(grid: pd.DataFrame) -> Iterator[str]:
    ranked = grid.drop(index=0, errors="ignore")
    rank, rate = ranked.stack().idxmin()
    best, control = ranked.loc[rank, rate], grid.loc[0].min() if 0 in grid.index else np.nan
    by_rate, by_rank = ranked.min(), ranked.min(axis=1)
    yield (
        f"**Learning rate and rank.** Over the rates tried, the best run of each spans {by_rate.min():.4f} to {by_rate.max():.4f} in "
        f"validation loss (best: {rate:g}{_edge(rate, list(ranked))}); over the ranks, {by_rank.min():.4f} to {by_rank.max():.4f} (best: {rank}{_edge(rank, list(ranked.index))})."
    )
    if not np.isnan(control):
        yield f"**The head bias alone.** Rank 0 ends at {control:.4f}, rank {rank} at {best:.4f} after as many steps."


def _on_the_length(folder: Path, plan: Plan) -> Iterator[str]:
    table = sweep_table(folder).set_index("run")
    runs = {
        run.settings.max_length: table.loc[run.name] for run in plan.runs_of(["context"]) if run.name in table.index
    }
    error = f"MAE, S = {P5_CONTEXTS[-1]}"
    if len(runs) > 1 and error in table:
        tried = "; ".join(
            f"{n} tokens, {_cell(error, row[error])} for {figure(row['flops'], 2)} FLOPs"
            for n, row in sorted(runs.items())
        )
        yield f"**Length of the windows.** Validation error at S = {P5_CONTEXTS[-1]}: {tried}."


def _on_the_changes(folder: Path, plan: Plan) -> Iterator[str]:
    changes = sweep_table(folder, ABLATION)
    if changes.empty:
        return
    changes = changes.assign(change=changes["run"].map(_in_words)).set_index("change")
    changes = changes[changes["precision"] == plan.final.precision]  # other texts have other losses
    if AS_PUBLISHED in changes.index:
        reference = changes.loc[AS_PUBLISHED]
        said = [
            f"{words} {row['val_loss'] - reference['val_loss']:+.4f} (FLOPs ×{row['flops'] / reference['flops']:.2f})"
            for words, row in changes.drop(index=AS_PUBLISHED).sort_values("val_loss").iterrows()
        ]
        yield (
            f"**What else is worth its price**, as change of the validation loss against the published setting ({reference['val_loss']:.4f}) "
            f"after {reference['max_steps']:g} steps: {'; '.join(said)}."
        )


def _on_the_steps(folder: Path) -> Iterator[str]:
    history = folder / "final" / "history.csv"
    if history.is_file():
        final = pd.read_csv(history)
        half = final[final["step"] <= final["step"].iloc[-1] / 2]
        yield (
            f"**Stop early if you must.** Half of the final run's steps bring the validation loss to {half['val_loss'].min():.4f}, "
            f"all of them to {final['val_loss'].min():.4f}."
        )


def _edge(value: float, values: Sequence[float]) -> str:
    return ", on the edge of the grid" if value in (min(values), max(values)) else ""


def _in_words(run: str) -> str:
    return run.removeprefix(f"{ABLATION}/").replace("-", " ")


def _errors(table: pd.DataFrame) -> list[str]:
    return [column for column in table if column.startswith("MAE")]


def _rows(table: pd.DataFrame, names: list[str]) -> str:
    """Some columns of a table in Markdown, losses and errors to four places."""
    lines = markdown_header(*(name.replace("_", " ") for name in names))
    for row in table[names].to_dict("records"):
        lines.append(f"| {' | '.join(_cell(name, value) for name, value in row.items())} |")
    return "\n".join(lines)


def _cell(name: str, value: str | float | None) -> str:
    if isinstance(value, str):
        return value
    if value is None or value != value:
        return "–"  # not measured, or no forecast was valid
    return f"{value:.4f}" if name == "val_loss" or name.startswith("MAE") else figure(value)
