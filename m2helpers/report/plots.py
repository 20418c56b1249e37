"""The pictures of the report: one palette, one colour for each thing, sizes that read well at page width."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.dates import ConciseDateFormatter
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from ..evaluation.scores import Result
from ..experiments.planning import stage_label

if TYPE_CHECKING:  # it loads torch, which no picture needs
    from ..forecasting import Forecasts, Outlook

__all__ = [
    "BASELINES",
    "PREDATOR",
    "PREY",
    "STAGES",
    "STAGE_LINES",
    "VARIABLES",
    "WIDTH",
    "bar_shares",
    "log_scale",
    "plot_by_context",
    "plot_by_family",
    "plot_by_variable",
    "plot_forecast",
    "plot_forecasts",
    "plot_grid",
    "plot_history",
    "plot_horizons",
    "plot_interval",
    "plot_own_forecast",
    "plot_per_step",
    "plot_phase",
    "plot_series",
    "use_style",
]

# seaborn's colour-blind palette; prey and predator have the same colours in every picture, and no stage shares them.
_PALETTE = sns.color_palette("colorblind").as_hex()
PREY, PREDATOR = _PALETTE[0], _PALETTE[1]
VARIABLES = {"prey": PREY, "predator": PREDATOR}
STAGES = {"untrained": "#7f7f7f", "initial": _PALETTE[4], "final": _PALETTE[2], "extended": _PALETTE[9]}
STAGE_LINES = {"untrained": ":", "initial": "--", "final": "-", "extended": "-."}
BASELINES = {
    "last value": _PALETTE[8],
    "seasonal naive": _PALETTE[6],
    "context parroting": _PALETTE[3],
    "vector autoregression": _PALETTE[5],
    "ODE fit": "#222222",
}
WIDTH = 8.0  # inches: the width of a page of the site


def use_style() -> None:
    """Set the look of all figures; call it once at the top of a notebook."""
    sns.set_theme(style="ticks", context="notebook", palette="colorblind", font_scale=0.9)
    plt.rcParams.update(
        {
            "figure.figsize": (WIDTH, 3.4),
            "figure.dpi": 110,
            "figure.constrained_layout.use": True,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.alpha": 0.3,
            "legend.frameon": False,
            "svg.hashsalt": "m2helpers",
        }
    )


def log_scale(ax: Axes) -> None:
    """Make the upright axis logarithmic, with plain numbers at 1, 2 and 5 of every decade."""
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter(NullFormatter())


def plot_series(ax: Axes, time: np.ndarray, values: np.ndarray, **line: Any) -> None:
    """Prey and predator against time, (steps,) and (steps, 2); `line` is matplotlib's to read."""
    for column, (name, colour) in enumerate(VARIABLES.items()):
        ax.plot(time, values[:, column], **({"color": colour, "label": name} | line))
    ax.set(xlabel="time", ylabel="population")


def plot_forecast(ax: Axes, time: np.ndarray, truth: np.ndarray, n_context: int, forecast: np.ndarray) -> None:
    """What the model saw, what came, and what it forecast.

    Parameters
    ----------
    time, truth : (steps,), (steps, 2)
        Context and future.
    n_context : int
        Steps of them that the model saw.
    forecast : (steps ahead that parsed, 2)
    """
    plot_series(ax, time, truth, lw=1.3, alpha=0.85)
    ahead = time[n_context : n_context + len(forecast)]
    for column, (name, colour) in enumerate(VARIABLES.items()):
        ax.plot(ahead, forecast[:, column], "o", ms=3.5, mfc="none", color=colour, label=f"{name}, forecast")
    ax.axvline(time[n_context - 1], color="0.4", lw=1, ls=":")


def plot_forecasts(
    time: np.ndarray, truths: Mapping[str, np.ndarray], n_context: int, forecasts: Sequence[np.ndarray]
) -> Figure:
    """A panel of `plot_forecast` for each series, title → (steps, 2), one under the other."""
    figure, axes = plt.subplots(len(truths), 1, figsize=(WIDTH, 2.0 * len(truths) + 0.5), sharex=True, squeeze=False)
    for ax, (title, truth), forecast in zip(axes.flat, truths.items(), forecasts, strict=True):
        plot_forecast(ax, time, truth, n_context, forecast)
        ax.set_title(title, loc="left", fontsize="medium")
        ax.label_outer()
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    return figure


def plot_interval(ax: Axes, time: np.ndarray, samples: np.ndarray) -> None:
    """Median and 80 % band of sampled forecasts, (samples, steps, 2), against their times (steps,)."""
    low, middle, high = np.quantile(samples, [0.1, 0.5, 0.9], axis=0)  # each (steps, 2)
    for column, (name, colour) in enumerate(VARIABLES.items()):
        ax.plot(time, middle[:, column], color=colour, ls="--", lw=1.3, label=f"{name}, median forecast")
        ax.fill_between(time, low[:, column], high[:, column], color=colour, alpha=0.2, lw=0)


def plot_own_forecast(forecasts: Forecasts, most: int = 12) -> Figure:
    """The forecasts of a user's own table, a panel for each variable of each series (the first `most`).

    Each shows the end of the history, the forecast with its 50 % and 80 % bands where paths were sampled, and the truth
    where it was held back.
    """
    table = forecasts.table
    panels = [(o, i) for o in forecasts.outlooks if not o.problem for i in range(len(table.variables))][:most]
    columns = 1 if len(panels) <= 4 else 2
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(WIDTH, 1.9 * rows + 1.1), squeeze=False, sharex=len({id(o) for o, _ in panels}) == 1
    )
    for number, (ax, (outlook, column)) in enumerate(zip(axes.flat, panels, strict=False)):
        _plot_outlook(ax, outlook, column)
        ax.set_ylabel(table.variables[column])
        if len(forecasts.outlooks) > 1:
            ax.set_title(f"{table.id_name or 'series'} {outlook.history.name}", loc="left", fontsize="medium")
        if number + columns >= len(panels):  # the lowest of its column
            ax.set_xlabel(table.time_name or "step")
            ax.tick_params(labelbottom=True)
    for ax in axes.flat[len(panels) :]:
        ax.remove()
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside upper center", ncols=5)
    return figure


def _plot_outlook(ax: Axes, outlook: Outlook, column: int) -> None:
    history, steps = outlook.history, outlook.paths.shape[1]
    past = history.last(max(40, 4 * steps))
    n = len(history.values)
    before = np.arange(n - len(past.values) + 1, n + 1) if past.index is None else past.index
    ahead = np.arange(n + 1, n + steps + 1) if outlook.index is None else outlook.index
    ax.plot(before, past.values[:, column], color="0.25", lw=1.3, label="history")
    if len(outlook.paths) > 1:
        levels = [0.1, 0.25, 0.5, 0.75, 0.9]
        low, lower, middle, upper, high = outlook.distribution.quantile(levels)[..., column]  # each (steps,)
        ax.fill_between(ahead, low, high, color=PREY, alpha=0.18, lw=0, label="80 % band")
        ax.fill_between(ahead, lower, upper, color=PREY, alpha=0.3, lw=0, label="50 % band")
        ax.plot(ahead, middle, "o-", ms=3, lw=1.3, color=PREY, label="forecast (median)")
    else:
        ax.plot(ahead, outlook.median[:, column], "o-", ms=3, lw=1.3, color=PREY, label="forecast")
    if outlook.truth is not None:
        ax.plot(ahead, outlook.truth[:, column], "x", ms=5, color=PREDATOR, label="truth, held back")
    if isinstance(past.index, pd.DatetimeIndex):
        ax.xaxis.set_major_formatter(ConciseDateFormatter(ax.xaxis.get_major_locator()))


def plot_phase(ax: Axes, values: np.ndarray, **line: Any) -> None:
    """Predator against prey, (steps, 2), with the start marked; `line` is matplotlib's to read."""
    (drawn,) = ax.plot(values[:, 0], values[:, 1], **({"lw": 1.0} | line))
    ax.plot(*values[0], "o", ms=4, color=drawn.get_color())
    ax.set(xlabel="prey population", ylabel="predator population")


def plot_per_step(ax: Axes, results: Mapping[str, Result], colours: Mapping[str, str]) -> None:
    """Mean absolute error against steps ahead, one line for each result."""
    for name, result in results.items():
        if result.per_step_mae is not None:
            steps = np.arange(1, len(result.per_step_mae) + 1)
            above = 3 if name in STAGES else 2  # a model is never hidden by a baseline
            line = "o-" if name in STAGES else "s--"
            ax.plot(steps, result.per_step_mae, line, ms=3, label=stage_label(name), color=colours[name], zorder=above)
    ax.set(xlabel="steps ahead", ylabel="mean absolute error\n(population units)")
    log_scale(ax)


def plot_horizons(panels: Mapping[str, Mapping[str, Result]]) -> Figure:
    """`plot_per_step` of several protocols side by side, title → stage or baseline → result, with one legend."""
    figure, axes = plt.subplots(1, len(panels), figsize=(WIDTH, 3.8), sharey=True, squeeze=False)
    for ax, (title, results) in zip(axes.flat, panels.items(), strict=True):
        plot_per_step(ax, results, STAGES | BASELINES)
        ax.set_title(title, loc="left", fontsize="medium")
        ax.label_outer()
    handles = {label: h for ax in axes.flat for h, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles, loc="outside upper center", ncols=5, fontsize="small")
    return figure


def plot_by_context(ax: Axes, results: Mapping[str, Sequence[Result]], colours: Mapping[str, str]) -> None:
    """P5 error against context length, with 95 % intervals, one line for each model."""
    for name, rows in results.items():
        rows = [row for row in rows if row.mae is not None]
        if not rows:
            continue
        mae = np.array([row.mae for row in rows])
        low, high = np.array([row.ci_mae for row in rows]).T
        ax.errorbar(
            [row.context for row in rows],
            mae,
            yerr=[mae - low, high - mae],
            fmt="o-" if name in STAGES else "s--",
            ms=4,
            capsize=3,
            label=stage_label(name),
            color=colours[name],
            zorder=3 if name in STAGES else 2,
        )
    contexts = sorted({row.context for rows in results.values() for row in rows})
    ax.set(xlabel="context (tokens)", ylabel="mean absolute error\n(population units)", xticks=contexts)
    log_scale(ax)


def plot_by_variable(axes: Sequence[Axes], results: Mapping[str, Sequence[Result]], spread: Sequence[float]) -> None:
    """P5 error of prey and predator by context: left in population units, right in per cent of each one's spread.

    Parameters
    ----------
    axes : two Axes
    results : mapping
        Stage → results.
    spread : (2,)
        Standard deviation of each variable, population units.
    """
    for stage, rows in results.items():
        errors = {row.context: row.mae_per_variable for row in rows if row.mae_per_variable is not None}
        for column, (name, colour) in enumerate(VARIABLES.items()):
            for ax, factor in zip(axes, (1, 100 / spread[column]), strict=True):
                shown = [factor * by_variable[column] for by_variable in errors.values()]
                look, label = {"color": colour, "ls": STAGE_LINES[stage]}, f"{name}, {stage_label(stage)}"
                ax.plot(list(errors), shown, "o", ms=4, label=label, **look)
    contexts = sorted({row.context for rows in results.values() for row in rows})
    for ax, unit in zip(axes, ("population units", "% of standard deviation"), strict=True):
        ax.set(xlabel="context (tokens)", ylabel=f"mean absolute error\n({unit})", xticks=contexts)
        log_scale(ax)


def plot_by_family(ax: Axes, losses: Mapping[str, Mapping[str, float]]) -> None:
    """Loss on each pre-training family, a dot for each stage, families in the order of the first one's loss."""
    first = next(iter(losses.values()))
    families = sorted(first, key=first.__getitem__)
    for stage, by_family in losses.items():
        values = [by_family[name] for name in families]
        ax.plot(values, range(len(families)), "o", color=STAGES[stage], label=stage_label(stage))
    ax.set(xlabel="loss (nats a token)", yticks=range(len(families)))
    ax.set_yticklabels([name.replace("_", " ") for name in families], fontsize=8)


def plot_history(ax: Axes, history: pd.DataFrame) -> None:
    """Training and validation loss against steps, and the step whose weights were kept."""
    best = history.loc[history["val_loss"].idxmin()]
    ax.plot(history["step"], history["loss"], color=_PALETTE[7], label="training (mean since the last point)")
    ax.plot(history["step"], history["val_loss"], color=STAGES["final"], label="validation")
    ax.plot(best["step"], best["val_loss"], "*", ms=11, color=STAGES["final"], label="kept")
    ax.set(xlabel="step", ylabel="loss (nats a token)")


def plot_grid(ax: Axes, losses: pd.DataFrame) -> None:
    """Heat map of validation losses, ranks × learning rates; a value that was not tried is left blank.

    Losses a tenth above the best and more share one colour, so that a lost run does not hide what the others differ by.
    """
    least, most = losses.min().min(), losses.max().max()
    bar = {"label": "validation loss\n(nats a token)", "extend": "max" if most > 1.1 * least else "neither"}
    top = min(most, 1.1 * least)
    sns.heatmap(losses, ax=ax, annot=True, fmt=".3f", cmap="viridis_r", vmax=top, cbar_kws=bar)
    ax.set(xlabel="learning rate", ylabel="rank")
    ax.grid(False)
    ax.set_xticklabels([f"{rate:g}" for rate in losses.columns])
    ax.tick_params(axis="y", rotation=0)


def bar_shares(ax: Axes, amounts: Mapping[str, float], unit: str) -> None:
    """Horizontal bars, largest on top, each labelled with its share of the whole."""
    ordered = sorted(amounts.items(), key=lambda item: item[1])
    names, values = zip(*ordered, strict=True)
    bars = ax.barh(names, values, color=_PALETTE[9])
    total = sum(values)
    ax.bar_label(bars, [f" {100 * value / total:.1f} %" for value in values], fontsize=8)
    ax.set(xlabel=unit)
    ax.margins(x=0.12)
