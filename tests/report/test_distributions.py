"""The tables and the picture of distributions show what the records hold."""

from dataclasses import replace
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np

from m2helpers import report
from m2helpers.evaluation.scores import DistributionScores
from m2helpers.report import distributions

SCORES = DistributionScores(
    samples=20, n=2, n_valid=2, crps=0.0123, ci_crps=[0.01, 0.02], crps_per_step=[0.0123] * 2, wql=0.05, ci_wql=[0.04, 0.06],
    coverage_80=0.7, ci_coverage_80=[0.6, 0.8], coverage_80_per_step=[0.75, 0.65], width_80=0.5, width_80_per_step=[0.4, 0.6],
    mae_median=0.02, ci_mae_median=[0.01, 0.03], mase_median=0.25, pit=[0.3, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.05, 0.05, 0.0],
    window_crps=[0.01, 0.0146], series=[0, 1],
)  # fmt: skip


def _row(context, distribution=None, calibrated=None, machine=None):
    return SimpleNamespace(context=context, distribution=distribution, calibrated=calibrated, machine=machine)


def _rows():
    wider = replace(SCORES, coverage_80=0.8, coverage_80_per_step=[0.81, 0.79], spread=[1.2, 1.3])
    return {
        "untrained": [_row(128), _row(512)],
        "extended": [_row(128, SCORES, wider, "a machine")],
    }


def test_tables_show_each_distribution_as_drawn_and_calibrated(monkeypatch):
    monkeypatch.setattr(distributions, "stage_results", lambda base: _rows())
    said = report.recorded_distributions()
    cells = "0.0123 (0.0100–0.0200) | 0.0500 (0.0400–0.0600) | {} (60%–80%) | 0.5000 | 0.0200 (0.0100–0.0300) | 0.250 | 2 of 2 |"
    assert f"| extended | 128 | as drawn | {cells.format('70%')}" in said
    assert f"| extended | 128 | calibrated | {cells.format('80%')}" in said
    assert "20 paths a window" in said and "a machine" in said and "before fine-tuning" not in said
    by_step = report.by_step_table().splitlines()
    assert by_step[2:] == [
        "| extended | 128 | as drawn | 75%; 0.4000 | 65%; 0.6000 |",
        "| extended | 128 | calibrated | 81%; 0.4000 | 79%; 0.6000 |",
    ]
    assert report.distributions_table([_row(128)]) == ""
    monkeypatch.setattr(distributions, "stage_results", lambda base: {"untrained": [_row(128)]})
    assert report.recorded_distributions() == "No distribution has been recorded for this base."


def test_a_pit_histogram_is_level_at_one_where_distributions_are_right():
    figure, axes = plt.subplots(1, 1, squeeze=False)
    report.plot_pit(axes[0], _rows())
    (ax,) = axes[0]
    (steps,) = ax.patches
    np.testing.assert_allclose(steps.get_data().values, np.multiply(SCORES.pit, 10))
    assert ax.lines[0].get_ydata()[0] == 1 and ax.get_title(loc="left") == "S = 128"
    assert ax.get_legend_handles_labels()[1] == ["extended"] and ax.get_xlabel() == "probability integral transform"
    plt.close(figure)
