"""The pictures that compare runs: same limits for all, and no point lost."""

import matplotlib
import numpy as np
import pytest

from m2helpers.report.comparisons import plot_before_after, scatter_log

matplotlib.use("Agg")
import matplotlib.pyplot as plt


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def test_every_run_of_a_window_has_the_same_limits_and_windows_have_their_own():
    series = np.linspace(1, 3, 40)[:, None] * [1.0, 0.5]  # (40, 2)
    windows = {"small": (series, 20), "large": (10 * series, 30)}
    narrow, wide = ([k * np.stack([s[i : i + 5] - w, s[i : i + 5], s[i : i + 5] + w]) for s, i in windows.values()] for k, w in ((1, 0.1), (1, 5.0)))  # fmt: skip
    figure = plot_before_after(np.arange(40) * 2.0, windows, {"untrained": wide, "final": narrow})
    axes = np.reshape(figure.axes, (2, 2))
    assert [ax.get_ylim() for ax in axes[0]] == [ax.get_ylim() for ax in axes[1]]
    assert axes[0, 0].get_ylim() != axes[0, 1].get_ylim()
    assert axes[0, 0].get_ylabel().startswith("before fine-tuning") and axes[1, 0].get_xlabel() == "time"
    assert axes[0, 0].get_lines()[0].get_xdata().tolist() == [2.0 * step for step in range(8, 25)]


def test_a_zero_stands_at_the_edge_and_is_counted():
    _, ax = plt.subplots()
    x, y = np.array([0.1, 0.2, 0.4, np.nan]), np.array([0.0, 0.02, 0.5, 0.1])
    scatter_log(ax, x, y)
    above, zero = ax.get_lines()
    assert np.isfinite(above.get_xdata()).sum() == 2
    assert zero.get_xdata().tolist() == [0.1] and zero.get_ydata().tolist() == [0.01] == [ax.get_ylim()[0]]
    assert zero.get_label() == "an error of zero: 1" and zero.get_markerfacecolor() == "none"


def test_without_zeros_nothing_is_added():
    _, ax = plt.subplots()
    scatter_log(ax, np.array([0.1, 1.0]), np.array([0.2, 2.0]))
    assert len(ax.get_lines()) == 1
