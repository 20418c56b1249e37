"""The README's picture: one test window, forecast by the base before fine-tuning and by the run that went furthest."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from ..data import load_dataset
from ..evaluation.protocols import Case, compared, make_cases
from ..files import atomic_path
from ..forecasting import generate
from ..models import Base, load_base
from ..paths import checkpoint_folder
from ..runs import Run, load_run
from ..settings import EMBEDDED
from .plots import VARIABLES, WIDTH, plot_interval, use_style
from .tables import stage_results

STAGE, CONTEXT, STEPS, PATHS = "extended", 128, 20, 40
HARDER_THAN = 0.75  # of the windows, by the base's recorded error


def before_after(base: str = EMBEDDED) -> Figure:
    """Median and 80 % band of sampled forecasts from one window of 128 tokens, before fine-tuning and after, on the same axes.

    The window is not picked by eye: of those with enough of their series to come, it is the one whose recorded error before
    fine-tuning has three quarters of the errors below it.
    """
    run = load_run(checkpoint_folder(base) / STAGE)
    values, case = _window(run, base)
    n_context = case.context.count(run.codec.step_separator)
    first = run.codec.encode(values).count(run.codec.step_separator, 0, case.start)
    time = np.arange(
        first + 1, first + 1 + n_context + 1 + STEPS
    )  # steps, counted from 1; one is cut by the window's end
    use_style()
    figure, axes = plt.subplots(1, 2, figsize=(WIDTH, 3.2), sharex=True, sharey=True)
    models = {"before fine-tuning": load_base(base), f"after: {STAGE}": run.base}
    for ax, (title, model) in zip(axes, models.items(), strict=True):
        known = values[time - 1]
        ax.axvspan(time[0], time[n_context], color="0.93", lw=0, zorder=0)
        for column, (name, colour) in enumerate(VARIABLES.items()):
            ax.plot(time, known[:, column], color=colour, lw=1.3, label=f"{name}, truth")
        plot_interval(ax, time[n_context + 1 :], _paths(model, run, case))
        ax.set(xlabel="step", title=title)
    axes[0].set(ylabel="population")
    axes[0].fill_between([], [], [], color="0.5", alpha=0.3, lw=0, label=f"80 % of {PATHS} sampled paths")
    axes[0].fill_between([], [], [], color="0.93", lw=0, label=f"seen: {CONTEXT} tokens")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize="small")
    return figure


def _window(run: Run, base: str) -> tuple[np.ndarray, Case]:
    """The series (steps, variables) and the window."""
    test = load_dataset().part("test")
    cases = make_cases(test, run.codec, "P5", CONTEXT)
    (row,) = (row for row in stage_results(base)["untrained"] if row.context == CONTEXT)
    errors = np.array([np.nan if error is None else error for error in row.window_mae])
    for i, case in enumerate(cases):
        text = run.codec.encode(test[case.series])
        if text.count(run.codec.step_separator, case.start + CONTEXT) < STEPS + 1:
            errors[i] = np.nan
    chosen = int(np.nanargmin(np.abs(errors - np.nanquantile(errors, HARDER_THAN))))
    return test[cases[chosen].series], cases[chosen]


def _paths(model: Base, run: Run, case: Case) -> np.ndarray:
    """Sampled continuations after the step that the window's end cuts, (paths, steps, variables)."""
    n_variables = case.truth.shape[1]
    texts = generate(
        model, run.codec, [case.context] * PATHS, STEPS + 1, n_variables, temperature=1.0, constrained=True
    )
    return np.array([compared(run.codec, one.text, 1, n_variables) for one in texts])


def write_picture(path: Path) -> None:
    """Draw `before_after` into a PNG file."""
    figure = before_after()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
    plt.close(figure)
