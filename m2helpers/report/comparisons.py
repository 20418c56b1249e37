"""Pictures that compare: every run on the same axes, and errors of windows where some are zero."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..experiments.planning import stage_label
from .plots import VARIABLES, WIDTH, plot_series

_BEFORE = 12  # steps shown before a forecast


def plot_before_after(
    time: np.ndarray, windows: Mapping[str, tuple[np.ndarray, int]], bands: Mapping[str, Sequence[np.ndarray]]
) -> Figure:
    """A row for each run and a column for each window, with the same limits in all rows of a column.

    Parameters
    ----------
    time : (steps,)
    windows : mapping
        Title → the whole series (steps, 2), and the step that is the first to be forecast.
    bands : mapping
        Stage → for each window the lower end, the middle and the upper end of its forecast, (3, steps ahead, 2).
    """
    shape = len(bands), len(windows)
    figure, axes = plt.subplots(
        *shape, figsize=(WIDTH, 1.55 * shape[0] + 0.7), sharex="col", sharey="col", squeeze=False
    )
    for row, (stage, forecasts) in zip(axes, bands.items(), strict=True):
        for ax, (series, first), (low, middle, high) in zip(row, windows.values(), forecasts, strict=True):
            stop = first + len(middle)
            shown = slice(max(first - _BEFORE, 0), stop)
            plot_series(ax, time[shown], series[shown], lw=1.2, alpha=0.85)
            for column, (name, colour) in enumerate(VARIABLES.items()):
                ahead = time[first:stop]
                ax.plot(ahead, middle[:, column], "--", color=colour, lw=1.3, label=f"{name}, median forecast")
                ax.fill_between(ahead, low[:, column], high[:, column], color=colour, alpha=0.22, lw=0)
            ax.axvline((time[first - 1] + time[first]) / 2, color="0.4", lw=1, ls=":")
            last_row, first_column = stage == list(bands)[-1], ax is row[0]
            ax.set(
                xlabel="time" if last_row else "", ylabel=f"{stage_label(stage)}\npopulation" if first_column else ""
            )
    for ax, title in zip(axes[0], windows, strict=True):
        ax.set_title(title, loc="left", fontsize="medium")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    return figure


def scatter_log(ax: Axes, x: np.ndarray, y: np.ndarray, **marks: Any) -> None:
    """Points on two logarithmic axes, (n,) and (n,). A zero, which such an axis has no place for, is an open mark at its edge.

    The edge lies at half the least value above zero. `marks` is matplotlib's to read; what is NaN is left out.
    """
    edges = [values[values > 0].min() / 2 for values in (x, y)]
    placed = [np.where(values == 0, edge, values) for values, edge in zip((x, y), edges, strict=True)]
    zero = (x == 0) | (y == 0)
    look = {"ms": 4, "alpha": 0.6} | marks
    ax.loglog(placed[0][~zero], placed[1][~zero], "o", **look)
    if zero.any():
        edge = {"mfc": "none", "alpha": 1, "clip_on": False, "zorder": 3, "label": f"an error of zero: {zero.sum()}"}
        ax.loglog(placed[0][zero], placed[1][zero], "o", **look | edge)
    if (x == 0).any():
        ax.set_xlim(left=edges[0])
    if (y == 0).any():
        ax.set_ylim(bottom=edges[1])
