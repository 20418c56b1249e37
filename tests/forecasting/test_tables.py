"""Forecasts of tables: columns apart or together, histories that are cut, series that cannot be forecast."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from m2helpers.files import UserError
from m2helpers.forecasting import forecast_table, tables
from m2helpers.series import table_of
from m2helpers.text import Codec


@pytest.fixture(autouse=True)
def no_ledger(monkeypatch):
    monkeypatch.setattr("m2helpers.forecasting.tables.default_ledger", lambda base: None)


@pytest.fixture
def echo(monkeypatch):
    """A model that writes the last values again; what it was given to read, by call."""
    read = []

    def forecast(base, codec, series, steps, **how):
        read.extend((codec, np.array(values)) for values in series)
        texts = [codec.decode(codec.encode(values[-1:]) * steps, values.shape[1]) for values in series]
        return [SimpleNamespace(values=values) for values, _ in texts]

    def sample(base, codec, series, steps, n_samples, **how):
        return [np.stack([one.values] * n_samples) for one in forecast(base, codec, series, steps)]

    monkeypatch.setattr(tables, "forecast", forecast)
    monkeypatch.setattr(tables, "sample_many", sample)
    return read


def _base(window=4096):
    config = SimpleNamespace(max_position_embeddings=window, name_or_path=None)
    return SimpleNamespace(model=SimpleNamespace(config=config))


def _waves(n=30, columns=2):
    t = np.arange(n)
    return pd.DataFrame({f"v{i}": (5 + np.sin(t / (2 + i))) * 10.0**i for i in range(columns)})


@pytest.mark.parametrize(("columns", "together", "texts"), [(3, None, 1), (4, None, 4), (4, True, 1), (2, False, 2)])
def test_columns_beyond_three_are_apart_unless_joined(columns, together, texts, echo):
    frame = _waves(columns=columns)
    made = forecast_table(_base(), table_of(frame), 4, together=together)
    assert len(echo) == texts
    last = np.repeat(frame.to_numpy()[-1:], 4, axis=0)
    np.testing.assert_allclose(made.outlooks[0].paths[0], last, rtol=2e-3)  # each within the text's own resolution


def test_columns_of_unlike_size_keep_their_digits(echo):
    """A rate of 0.1 beside a product of 2e7: one scale for both would write the rate as zeros."""
    frame = pd.DataFrame(
        {"gdp": 2e7 + 8e6 * np.sin(np.arange(40) / 3), "rate": 0.09 + 0.04 * np.cos(np.arange(40) / 3)}
    )
    made = forecast_table(_base(), table_of(frame), 6)
    np.testing.assert_allclose(made.outlooks[0].paths[0][-1], frame.to_numpy()[-1], rtol=1e-3)
    as_before = forecast_table(_base(), table_of(frame), 6, codec=Codec(1e-6), own_scale=False)
    assert (as_before.outlooks[0].paths[0][:, 1] == [0.09 // 1] * 6).all()  # the run's scale is the run's


def test_the_runs_scale_writes_as_the_run_does(echo):
    frame = _waves()
    forecast_table(_base(), table_of(frame), 3, codec=Codec(0.5, 3), own_scale=False)
    ((codec, values),) = echo
    assert codec == Codec(0.5, 3)
    np.testing.assert_array_equal(values, frame)


def test_a_long_history_is_cut_to_what_fits(echo):
    made = forecast_table(_base(window=200), table_of(_waves(n=500)), 4)
    ((codec, values),) = echo
    longest = max(map(len, codec.encode(values).split(";"))) + 1
    assert 200 - 2 * longest <= len(codec.encode(values)) + 4 * longest <= 200  # no more than one step is wasted
    assert made.notices == [f"the last {len(values)} of 500 rows are used, as many as the model was trained to read"]
    assert len(made.outlooks[0].history.values) == len(values)


def test_what_the_base_was_trained_at_is_what_it_reads(echo, tmp_path):
    (tmp_path / "pretraining.json").write_text('{"settings": {"max_length": 200}}')
    base = _base()
    base.model.config.name_or_path = str(tmp_path)
    made = forecast_table(base, table_of(_waves(n=500)), 4)
    assert len(made.outlooks[0].history.values) < 20
    with pytest.raises(UserError, match="nothing was forecast: 40 steps leave no room for the series"):
        forecast_table(base, table_of(_waves(n=500)), 40)


def test_one_dead_series_does_not_stop_the_others(echo):
    good = pd.DataFrame({"id": "good", "y": 2 + np.sin(np.arange(20.0))})
    short = pd.DataFrame({"id": "short", "y": [1.0, 2.0]})
    spiked = good.assign(id="spiked").copy()
    spiked.loc[7, "y"] = 5e4
    made = forecast_table(_base(), table_of(pd.concat([short, good, spiked])), 3)
    assert [bool(outlook.problem) for outlook in made.outlooks] == [True, False, True]
    assert made.notices[0] == "series short: 2 steps are too few to forecast from; give at least 3"
    assert made.notices[1].startswith("series spiked: row 30, column y: 50000 is")
    assert made.notices[1].endswith("times as far off as the rest; correct it, or leave it out with --last 12")
    with pytest.raises(UserError, match="the table: nothing was forecast: 2 steps are too few"):
        forecast_table(_base(), table_of(short), 3)


def test_nothing_parsed_is_an_error_and_half_is_said(monkeypatch):
    made = SimpleNamespace(values=np.full((1, 2), 5.0))
    monkeypatch.setattr(tables, "forecast", lambda base, codec, series, *_, **__: [made] * len(series))
    half = forecast_table(_base(), table_of(_waves()), 3)
    assert half.n_invalid == 1 and np.isfinite(half.outlooks[0].paths).all(axis=(0, 2)).tolist() == [True, False, False]
    made.values = np.empty((0, 2))
    with pytest.raises(UserError, match="nothing was forecast: nothing that the model wrote parsed; --constrained"):
        forecast_table(_base(), table_of(_waves()), 3)


def test_samples_that_do_not_parse_are_left_out(monkeypatch):
    monkeypatch.setattr(
        tables, "sample_many", lambda base, codec, series, steps, n_samples, **_: [np.ones((2, steps, 2))]
    )
    made = forecast_table(_base(), table_of(_waves()), 3, samples=5)
    assert made.n_invalid == 3 and made.outlooks[0].paths.shape == (5, 3, 2)


@pytest.mark.parametrize("unit", [1e-9, 1.0, 1e9])
def test_units_do_not_matter(unit, tiny_base):
    """With a model of random weights: the same text, so the same forecast times the unit."""
    frame = _waves()
    plain = forecast_table(tiny_base(), table_of(frame), 3, constrained=True).outlooks[0].paths
    scaled = forecast_table(tiny_base(), table_of(frame * unit), 3, constrained=True).outlooks[0].paths
    np.testing.assert_allclose(scaled, plain * unit, rtol=1e-9)


def test_a_constant_stays_itself(echo):
    for value in (7.25, 0.0, -3.0):
        made = forecast_table(_base(), table_of(pd.DataFrame({"a": [value] * 20})), 3)
        np.testing.assert_allclose(made.outlooks[0].paths, value)


def test_a_distribution_is_in_the_tables_units(echo):
    """Each value stands for the numbers that round to it in the text: of a large level too."""
    frame = pd.DataFrame({"a": 1e6 + np.cos(np.arange(20)), "b": np.sin(np.arange(20))})
    (outlook,) = forecast_table(_base(), table_of(frame), 2, samples=4).outlooks
    low, high = outlook.distribution.quantile([0, 1])[:, 0]
    ((_, values),) = echo
    scale = np.ptp(values, axis=0) / np.ptp(frame.to_numpy(), axis=0)
    np.testing.assert_allclose(high - low, 0.01 / scale, rtol=1e-6)
    np.testing.assert_allclose((low + high) / 2, outlook.paths[0, 0], rtol=1e-9)
    np.testing.assert_allclose(outlook.median, outlook.paths[0], rtol=1e-9)


def test_a_distribution_has_the_paths_that_reach_a_step():
    paths = np.array([[1.0, 1.0, np.nan], [3.0, np.nan, np.nan]])[..., np.newaxis]
    table = table_of(_waves(columns=1))
    (history,) = table.histories
    np.testing.assert_allclose(tables.Outlook(history, None, paths).median[:, 0], [2, 1, np.nan], rtol=1e-6)


def test_no_step_is_refused(echo):
    with pytest.raises(UserError, match="cannot forecast 0 steps"):
        forecast_table(_base(), replace(table_of(_waves())), 0)
