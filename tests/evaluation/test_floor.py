"""The floor's records: scores of draws, a stop that loses nothing, what does not mix, and how far a model is from it."""

from dataclasses import replace

import numpy as np
import pytest

from m2helpers.data import Dataset
from m2helpers.evaluation import floor as module
from m2helpers.evaluation.floor import Floor, bayes_gap, crps, floor, floor_row
from m2helpers.evaluation.measure import rounding_cost
from m2helpers.evaluation.protocols import make_cases
from m2helpers.files import UserError
from m2helpers.simulator import Law, SimulatorSettings, draw_parameters, simulate
from m2helpers.text import Codec, fit_scale

LAW = Law(draw_parameters(SimulatorSettings(systems=30)).to_numpy(), 2.0, 100)


def test_crps_is_the_integral_of_its_definition():
    draws, truth = np.random.default_rng(0).gamma(2.0, size=(40, 3)), np.array([0.5, 2.0, 9.0])
    grid = np.linspace(-1, 12, 260_001)
    for column, value, score in zip(draws.T, truth, crps(draws, truth), strict=True):
        below = np.searchsorted(np.sort(column), grid, side="right") / len(column)
        assert score == pytest.approx(np.trapezoid((below - (grid >= value)) ** 2, grid), abs=1e-3)


@pytest.fixture(scope="module")
def data():
    time, trajectories, _ = simulate(SimulatorSettings(systems=30))
    return Dataset("made.h5", time, trajectories, "0" * 64)


@pytest.fixture
def codec(data):
    return Codec(fit_scale(data.part("train")))


@pytest.fixture
def predicted(data, codec, monkeypatch):
    """Forecasts of the floor replaced by the truth and a band about it; the list of windows they were made for."""
    made = []

    def predict(dataset, codec, law, case, seed):
        made.append(seed)
        stored = case.stored
        return stored, stored - 0.1, stored + 0.1, np.full(stored.shape, 0.02), 1.05, 500.0

    monkeypatch.setattr(module, "_predict", predict)
    return made


def test_a_stopped_floor_goes_on_where_it_was_saved(data, codec, predicted, tmp_path):
    options = dict(split="test", cache=tmp_path, progress=False)
    few = floor(data, codec, LAW, 128, limit=2, **options)
    assert len(few) == 2 and predicted == [[128, 0], [128, 1]]
    whole = floor(data, codec, LAW, 128, **options)
    assert len(whole) == len(make_cases(data.part("test"), codec, "P5", 128)) == len(predicted) > 2
    assert len(floor(data, codec, LAW, 128, limit=1, **options)) == 1  # and none is made again
    assert len(predicted) == len(whole)
    other = Law(LAW.parameters, LAW.dt, 99)
    floor(data, codec, other, 128, limit=1, **options)  # another law: nothing of it is used
    assert len(predicted) == len(whole) + 1


def test_scores_count_what_did_not_mix(data, codec, predicted, tmp_path):
    found = floor(data, codec, LAW, 128, cache=tmp_path, progress=False)
    row = floor_row(data, codec, 128, found)
    assert (row.mae, row.coverage_80, row.n_mixed) == (0, 1, row.n)  # the truth rounded is the rounded truth
    assert row.mae_stored < 1e-6 and row.crps == pytest.approx(0.02)
    stuck = replace(found, rhat=np.where(np.arange(len(found)) == 0, np.inf, 1.0))
    row = floor_row(data, codec, 128, stuck)
    assert row.n_mixed == row.n - 1 and row.window_mae[0] is None
    with pytest.raises(UserError, match="chains mixed; compute more windows"):
        floor_row(data, codec, 128, replace(found, rhat=np.full(len(found), 2.0)))


def test_the_gap_is_a_ratio_on_the_windows_that_both_have(data, codec):
    (result, *_) = rounding_cost(data, codec)
    n = len(result.window_mae)
    cases = make_cases(data.part("test"), codec, "P5", 128)
    zeros = np.zeros((n, 5, 2))
    median = np.stack([case.truth for case in cases]) + 2 / codec.scale / 100  # two units off
    found = Floor(median, zeros, zeros, zeros, np.ones(n), np.ones(n))
    row = floor_row(data, codec, 128, found)
    off = [0.06 / codec.scale] * (n - 1) + [None]  # six units, and no forecast of the last window
    (gap,) = bayes_gap({"ours": [replace(result, window_mae=off)]}, [row]).to_dict("records")
    assert (
        gap["n"] == n - 1 and gap["MAE gap"] == pytest.approx(3, rel=1e-4) and gap["low"] == pytest.approx(3, rel=1e-4)
    )
