"""The pictures: what each draws, with which labels, scales and colours."""

from dataclasses import replace

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import same_color, to_hex

from m2helpers.report import plots, tables
from m2helpers.report.plots import BASELINES, PREDATOR, PREY, STAGE_LINES, STAGES, VARIABLES

matplotlib.use("Agg")
plt = plots.plt

TIME = np.arange(12) * 2.0
VALUES = np.stack([2 + np.sin(TIME), 1 + 0.5 * np.cos(TIME)], axis=1)  # (12, 2)
ERROR = "mean absolute error\n(population units)"
RECORDED = tables.stage_results("embedded")["final"][0]


@pytest.fixture
def ax():
    _, ax = plt.subplots()
    yield ax
    plt.close("all")


def _result(mae, context=128):
    """A result whose every error is made up from one."""
    if mae is None:
        return replace(RECORDED, context=context, mae=None, ci_mae=None, per_step_mae=None, mae_per_variable=None)
    per_step, interval = [mae * k for k in (1, 2, 3)], [0.8 * mae, 1.5 * mae]
    about = dict(context=context, mae=mae, ci_mae=interval, per_step_mae=per_step, mae_per_variable=[mae, mae / 2])
    return replace(RECORDED, **about)


def _labelled(ax):
    """Label → the line of that label."""
    return {line.get_label(): line for line in ax.get_lines() if not line.get_label().startswith("_")}


def _ticks(ax):
    """What stands at the upright axis, as far as it is in view."""
    ax.figure.canvas.draw()
    low, high = ax.get_ylim()
    shown = zip(ax.get_yticks(), ax.get_yticklabels(), strict=True)
    return [label.get_text() for place, label in shown if low <= place <= high]


# ---------------------------------------------------------------- colours and style


def test_each_thing_has_a_colour_of_its_own():
    colours = [to_hex(c) for c in (PREY, PREDATOR, *STAGES.values(), *BASELINES.values())]
    assert len(set(colours)) == len(colours)
    assert VARIABLES == {"prey": PREY, "predator": PREDATOR} and set(STAGE_LINES) == set(STAGES)


def test_the_style_is_that_of_every_figure():
    with plt.rc_context():
        plots.use_style()
        assert plt.rcParams["figure.figsize"][0] == plots.WIDTH and plt.rcParams["axes.grid"]
        assert plt.rcParams["svg.hashsalt"]  # the same picture is the same file


def test_a_log_scale_has_plain_numbers_at_one_two_and_five(ax):
    ax.plot([0, 1], [0.009, 1.2])
    plots.log_scale(ax)
    assert ax.get_yscale() == "log"
    assert _ticks(ax) == ["0.01", "0.02", "0.05", "0.1", "0.2", "0.5", "1"]


# ---------------------------------------------------------------- series


def test_a_series_is_a_line_for_each_variable(ax):
    plots.plot_series(ax, TIME, VALUES)
    lines = _labelled(ax)
    assert list(lines) == ["prey", "predator"] and (ax.get_xlabel(), ax.get_ylabel()) == ("time", "population")
    for column, (name, colour) in enumerate(VARIABLES.items()):
        assert lines[name].get_color() == colour
        np.testing.assert_array_equal(lines[name].get_xydata(), np.stack([TIME, VALUES[:, column]], axis=1))
    plots.plot_series(ax, TIME, VALUES, color="red", label="other")
    assert [line.get_color() for line in ax.get_lines()[2:]] == ["red", "red"]


def test_a_forecast_begins_after_its_context(ax):
    ahead = VALUES[8:11] + 0.1
    plots.plot_forecast(ax, TIME, VALUES, 8, ahead)
    lines = _labelled(ax)
    for column, (name, colour) in enumerate(VARIABLES.items()):
        made = lines[f"{name}, forecast"]
        assert made.get_color() == lines[name].get_color() == colour
        np.testing.assert_array_equal(made.get_xydata(), np.stack([TIME[8:11], ahead[:, column]], axis=1))
    (border,) = (line for line in ax.get_lines() if line.get_label().startswith("_"))
    assert set(border.get_xdata()) == {TIME[7]}


def test_forecasts_have_a_panel_each_and_one_legend(ax):
    figure = plots.plot_forecasts(TIME, {"best": VALUES, "worst": VALUES + 1}, 8, [VALUES[8:], VALUES[8:9]])
    assert [panel.get_title(loc="left") for panel in figure.axes] == ["best", "worst"]
    assert [panel.get_xlabel() for panel in figure.axes] == ["", "time"]  # the axis is shared
    assert [len(_labelled(panel)["prey, forecast"].get_xdata()) for panel in figure.axes] == [4, 1]
    (legend,) = figure.legends
    labels = ["prey", "predator", "prey, forecast", "predator, forecast"]
    assert [text.get_text() for text in legend.get_texts()] == labels


def test_an_interval_is_the_median_and_the_middle_four_fifths(ax):
    samples = np.arange(101.0)[:, None, None] * [1.0, 2.0] + np.zeros((1, 3, 1))  # (101, 3, 2)
    plots.plot_interval(ax, TIME[:3], samples)
    lines = _labelled(ax)
    assert list(lines) == ["prey, median forecast", "predator, median forecast"]
    for band, line, colour, factor in zip(ax.collections, lines.values(), VARIABLES.values(), (1, 2), strict=True):
        np.testing.assert_allclose(line.get_ydata(), 50 * factor)
        heights = band.get_paths()[0].vertices[:, 1]
        assert (heights.min(), heights.max()) == pytest.approx((10 * factor, 90 * factor))
        assert line.get_color() == colour and same_color(
            band.get_facecolor()[0], (*matplotlib.colors.to_rgb(colour), 0.2)
        )


def test_a_phase_portrait_marks_the_start(ax):
    plots.plot_phase(ax, VALUES, color=PREY)
    path, start = ax.get_lines()
    np.testing.assert_array_equal(path.get_xydata(), VALUES)
    np.testing.assert_array_equal(start.get_xydata(), VALUES[:1])
    assert path.get_color() == start.get_color() == PREY
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("prey population", "predator population")


# ---------------------------------------------------------------- errors


def test_errors_by_step_leave_out_what_has_none(ax):
    results = {"final": _result(0.1), "untrained": _result(None), "ODE fit": _result(0.01)}
    plots.plot_per_step(ax, results, STAGES | BASELINES)
    lines = _labelled(ax)
    assert list(lines) == ["final", "ODE fit"] and lines["final"].get_color() == STAGES["final"]
    np.testing.assert_allclose(lines["final"].get_xydata(), [[1, 0.1], [2, 0.2], [3, 0.3]])
    assert lines["final"].get_zorder() > lines["ODE fit"].get_zorder()
    assert (ax.get_xlabel(), ax.get_ylabel(), ax.get_yscale()) == ("steps ahead", ERROR, "log")


def test_horizons_stand_side_by_side_with_one_legend(ax):
    figure = plots.plot_horizons({"L50": {"final": _result(0.1)}, "L20": {"initial": _result(0.2)}})
    assert [panel.get_title(loc="left") for panel in figure.axes] == ["L50", "L20"]
    assert [panel.get_ylabel() for panel in figure.axes] == [ERROR, ""]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["final", "initial"]


def test_errors_by_context_have_their_intervals(ax):
    results = {"initial": [_result(0.2, 128), _result(0.1, 512)], "final": [_result(None, 768)]}
    plots.plot_by_context(ax, results, STAGES)
    (container,) = ax.containers  # of the stage that has an error
    line, _, (bars,) = container.lines
    np.testing.assert_allclose(line.get_xydata(), [[128, 0.2], [512, 0.1]])
    np.testing.assert_allclose([bar[:, 1] for bar in bars.get_segments()], [[0.16, 0.3], [0.08, 0.15]])
    assert line.get_color() == STAGES["initial"] and list(ax.get_xticks()) == [128, 512, 768]
    assert (ax.get_xlabel(), ax.get_ylabel(), ax.get_yscale()) == ("context (tokens)", ERROR, "log")


def test_errors_by_variable_are_in_units_and_in_per_cent(ax):
    _, axes = plt.subplots(1, 2)
    rows = [_result(0.2, 128), _result(None, 512), _result(0.1, 768)]
    plots.plot_by_variable(axes, {"initial": rows[:2], "final": rows}, [2.0, 0.5])
    left, right = (_labelled(panel) for panel in axes)
    assert list(left) == ["prey, initial", "predator, initial", "prey, final", "predator, final"]
    np.testing.assert_allclose(left["predator, final"].get_xydata(), [[128, 0.1], [768, 0.05]])
    np.testing.assert_allclose(right["prey, final"].get_ydata(), [10, 5])  # of a spread of 2
    np.testing.assert_allclose(right["predator, final"].get_ydata(), [20, 10])  # of a spread of 0.5
    for label, line in left.items():
        name, stage = label.split(", ")
        assert line.get_color() == VARIABLES[name] and line.get_linestyle() == STAGE_LINES[stage]
    units = [ERROR, "mean absolute error\n(% of standard deviation)"]
    assert [panel.get_ylabel() for panel in axes] == units
    assert {panel.get_yscale() for panel in axes} == {"log"} and list(axes[0].get_xticks()) == [128, 512, 768]


# ---------------------------------------------------------------- losses and shares


def test_families_stand_in_the_order_of_the_first_stage(ax):
    first = {"b_family": 0.3, "a_family": 0.1}
    plots.plot_by_family(ax, {"untrained": first, "final": {"b_family": 0.2, "a_family": 0.4}})
    lines = _labelled(ax)
    np.testing.assert_allclose(lines["final"].get_xydata(), [[0.4, 0], [0.2, 1]])
    colours = {name: line.get_color() for name, line in lines.items()}
    assert colours == {"before fine-tuning": STAGES["untrained"], "final": STAGES["final"]}
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a family", "b family"]
    assert ax.get_xlabel() == "loss (nats a token)"


def test_a_history_marks_the_weights_that_were_kept(ax):
    history = pd.DataFrame({"step": [10, 20, 30], "loss": [3.0, 2.0, 1.0], "val_loss": [2.5, 1.5, 1.7]})
    plots.plot_history(ax, history)
    lines = _labelled(ax)
    assert list(lines) == ["training (mean since the last point)", "validation", "kept"]
    assert list(lines["kept"].get_xydata()[0]) == [20, 1.5] and lines["kept"].get_color() == STAGES["final"]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("step", "loss (nats a token)")


def test_a_grid_shows_every_loss_and_leaves_the_untried_blank(ax):
    losses = pd.DataFrame([[0.5, 0.52], [np.nan, 5.0]], index=[8, 2], columns=[1e-3, 5e-3])
    plots.plot_grid(ax, losses)
    assert [text.get_text() for text in ax.texts] == ["0.500", "0.520", "5.000"]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("learning rate", "rank")
    assert [label.get_text() for label in ax.get_xticklabels()] == ["0.001", "0.005"]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["8", "2"]
    (mesh,) = ax.collections
    assert mesh.get_clim() == pytest.approx((0.5, 0.55))  # a lost run does not hide what the others differ by
    assert ax.figure.axes[1].get_ylabel() == "validation loss\n(nats a token)"


def test_shares_are_bars_with_the_largest_on_top(ax):
    plots.bar_shares(ax, {"small": 1e9, "large": 3e9}, "FLOPs")
    assert [label.get_text() for label in ax.get_yticklabels()] == ["small", "large"]
    assert [bar.get_width() for bar in ax.patches] == [1e9, 3e9] and ax.get_xlabel() == "FLOPs"
    assert [text.get_text() for text in ax.texts] == [" 25.0 %", " 75.0 %"]
