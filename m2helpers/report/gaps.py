"""How far the recorded runs, and the fit of the law, are from the best possible forecast: the Bayes gap, from the shipped floors."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from ..evaluation.floor import FloorRow, bayes_gap, floor_row, recorded_floor
from ..evaluation.protocols import P5_CONTEXTS
from ..experiments.planning import stage_label
from ..simulator import law_of
from .findings import markdown_header
from .plots import BASELINES, STAGES, log_scale
from .tables import baseline_results, shipped_data, stage_results
from .terms import LAW

COLOURS = STAGES | BASELINES


def recorded_gaps(base: str = "embedded") -> tuple[list[FloorRow], pd.DataFrame]:
    """The floors that are shipped, one for each length of context, and `bayes_gap` of each recorded run and of the ODE fit."""
    dataset, codec = shipped_data()
    law = law_of(dataset)
    found = [(context, recorded_floor(dataset, codec, law, context)) for context in P5_CONTEXTS]
    rows = [floor_row(dataset, codec, context, floor) for context, floor in found if len(floor)]
    records = stage_results(base) | {name: results for name, results in baseline_results().items() if name == LAW}
    return rows, bayes_gap(records, rows)


def gap_passage(floors: Sequence[FloorRow], gaps: pd.DataFrame) -> str:
    """What `recorded_gaps` found, in Markdown; says so where no floor is shipped."""
    if not floors:
        return (
            "**Not measured yet.** No floor of the test windows is shipped with this version, so the gap cannot be stated; `m2helpers floor` computes it, in hours. "
            f"Until then the {LAW} stands in for it, which is one point and no limit."
        )
    lines = markdown_header("error over the floor's", *(f"S = {row.context}" for row in floors))
    for model, group in gaps.groupby("model", sort=False):
        by_context = group.set_index("S")
        cells = ["–" if row.context not in by_context.index else _cell(by_context.loc[row.context]) for row in floors]
        lines.append(f"| {stage_label(str(model))} | {' | '.join(cells)} |")
    basis = "; ".join(f"S = {row.context}: {row.mae:.5f}, from {row.n_mixed} of {row.n} windows" for row in floors)
    said = f"The floor's own mean absolute error, on equal terms: {basis}. 95 % bootstrap intervals in brackets."
    if "CRPS gap" in gaps and gaps["CRPS gap"].notna().any():
        scored = gaps.dropna(subset="CRPS gap")
        each = zip(scored["model"], scored["S"], scored["CRPS gap"], strict=True)
        words = "; ".join(f"{stage_label(model)} at S = {context}: {gap:.1f}" for model, context, gap in each)
        said += f" Of whole distributions, by CRPS, over the floor's: {words}."
    absent = [str(context) for context in P5_CONTEXTS if context not in {row.context for row in floors}]
    return "\n".join([*lines, "", said + (f" Not computed yet: S = {', '.join(absent)}." if absent else "")])


def _cell(row: pd.Series) -> str:
    return f"{row['MAE gap']:.1f} ({row['low']:.1f}–{row['high']:.1f})"


def plot_gap(axes: Sequence[Axes], floors: Sequence[FloorRow], gaps: pd.DataFrame) -> None:
    """Left, errors by context with the floor under them; right, each error over the floor's, with 95 % intervals."""
    contexts = [row.context for row in floors]
    for model, group in gaps.groupby("model", sort=False):
        line = dict(color=COLOURS[str(model)], ms=4, label=stage_label(str(model)))
        style = "o-" if model in STAGES else "s--"
        axes[0].plot(group["S"], group["MAE"], style, **line)
        beyond = np.abs(group[["low", "high"]].to_numpy().T - group["MAE gap"].to_numpy())  # (2, contexts)
        axes[1].errorbar(group["S"], group["MAE gap"], yerr=beyond, fmt=style, capsize=3, **line)
    for ax, label in zip(
        axes, ("mean absolute error\n(population units)", "error over the best possible"), strict=True
    ):
        ax.set(xlabel="context (tokens)", ylabel=label, xticks=contexts)
        log_scale(ax)
    limits: list[list[float]] = [[row.mae for row in floors], [1.0] * len(floors)]
    for ax, best in zip(axes, limits, strict=True):
        below = min(ax.get_ylim()[0], *best) / 1.2
        ax.fill_between(contexts, below, best, color="0.88", lw=0, zorder=0, label="below the best possible")
        ax.plot(contexts, best, ".-", color="0.5", lw=2, zorder=1)
        ax.set_ylim(bottom=below)
