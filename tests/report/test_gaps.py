"""The Bayes gap in words and in a picture."""

import matplotlib.pyplot as plt
import numpy as np
import pytest

from m2helpers.data import load_dataset
from m2helpers.evaluation.floor import Floor
from m2helpers.evaluation.protocols import make_cases
from m2helpers.report import gaps, tables
from tests.report.test_conclusions import RESULTS, _cells


def test_without_a_floor_the_gap_is_said_to_be_unmeasured(monkeypatch):
    empty = np.empty((0, 5, 2))
    monkeypatch.setattr(
        gaps, "recorded_floor", lambda *about: Floor(empty, empty, empty, empty, np.empty(0), np.empty(0))
    )
    assert gaps.gap_passage(*gaps.recorded_gaps()).startswith("**Not measured yet.**")


def test_the_gap_is_the_models_error_over_the_floors(monkeypatch):
    _, codec = tables.shipped_data()
    cases = make_cases(load_dataset().part("test"), codec, "P5", 128)[:40]
    truth, off = (
        np.stack([case.truth for case in cases]),
        0.1 / codec.scale * np.ones((40, 5, 2)),
    )  # ten hundredths as text
    whole = Floor(truth + off, truth, truth + 2 * off, off, np.ones(40), np.full(40, 100.0))
    none = Floor(*(part[:0] for part in (truth, truth, truth, truth, np.ones(40), np.ones(40))))
    monkeypatch.setattr(gaps, "recorded_floor", lambda d, c, law, s: whole if s == 128 else none)
    rows, found = gaps.recorded_gaps()
    passage = gaps.gap_passage(rows, found)
    ours = np.mean(RESULTS["final"][0].window_mae[:40])
    assert _cells(passage, "final")[1].startswith(f"{ours / (0.1 / codec.scale):.1f} (")
    assert (
        f"S = 128: {0.1 / codec.scale:.5f}, from 40 of 40 windows" in passage
        and "Not computed yet: S = 512, 768" in passage
    )
    figure, axes = plt.subplots(1, 2)
    gaps.plot_gap(axes, rows, found)
    _, labels = axes[0].get_legend_handles_labels()
    assert {"final", "ODE fit", "below the best possible"} < set(labels)
    shown = {line.get_label(): line.get_ydata() for line in axes[0].lines}
    assert shown["final"] == pytest.approx([ours])
    plt.close(figure)
