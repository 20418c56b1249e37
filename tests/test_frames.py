"""A DataFrame in, a DataFrame of predictions out; and how good they would have been."""

import numpy as np
import pandas as pd
import pytest

from m2helpers import forecasting
from m2helpers.files import UserError
from m2helpers.frames import LEVELS, backtest, forecast_frame, forecast_held_back, scores, wide_frame
from m2helpers.outlooks import Forecasts, Outlook, forecast_table
from m2helpers.series import table_of


@pytest.fixture
def ramp(monkeypatch):
    """A model whose samples are the last values plus 1, 2, 3, ... hundredths of the text, and whose likeliest is the last."""

    def sample(base, codec, values, steps, n_samples, **_):
        return np.stack([np.repeat(values[-1:], steps, axis=0) + 0.01 * i for i in range(n_samples)])

    def forecast(base, codec, series, steps, **_):
        return [type("F", (), {"values": np.repeat(values[-1:], steps, axis=0)}) for values in series]

    monkeypatch.setattr(forecasting, "sample_forecasts", sample)
    monkeypatch.setattr(forecasting, "forecast", forecast)


def _long(n=20):
    days = pd.date_range("2021-01-01", periods=n, freq="D")
    values = 2 + np.sin(np.arange(n) / 3)
    parts = [
        pd.DataFrame({"item": name, "day": days, "hare": values * i, "lynx": values + i})
        for i, name in ((1, "x"), (2, "y"))
    ]
    return pd.concat(parts, ignore_index=True)


def test_predictions_in_the_manner_of_predict_df(ramp, tiny_base):
    frame = forecast_frame(_long(), 3, base=tiny_base(), samples=11)
    assert list(frame.columns) == ["item", "day", "target_name", "predictions", *(f"{level:g}" for level in LEVELS)]
    assert (
        frame["item"].tolist() == ["x"] * 6 + ["y"] * 6
        and frame["target_name"].tolist() == (["hare"] * 3 + ["lynx"] * 3) * 2
    )
    assert frame["day"][:3].tolist() == list(pd.date_range("2021-01-21", periods=3))
    assert (frame["predictions"] == frame["0.5"]).all() and (np.diff(frame[["0.1", "0.5", "0.9"]]) > 0).all()
    assert "2 series x, y by item; 2 variables hare, lynx; day taken as time" in frame.attrs["notices"][0]


def test_columns_and_levels_can_be_said(ramp, tiny_base):
    data = _long().query("item == 'x'").assign(note=1.0)
    frame = forecast_frame(
        data, 2, base=tiny_base(), id_column="item", time_column="day", targets=["lynx"], levels=[0.25], samples=4
    )
    assert list(frame.columns) == ["item", "day", "target_name", "predictions", "0.25"]
    assert set(frame["target_name"]) == {"lynx"}
    plain = forecast_frame(data[["lynx"]], 2, base=tiny_base(), samples=0)
    assert plain[["step", "target_name"]].values.tolist() == [[1, "lynx"], [2, "lynx"]]
    assert list(plain.columns) == ["step", "target_name", "predictions"]
    np.testing.assert_allclose(plain["predictions"], data["lynx"].iloc[-1])


def test_the_real_model_on_a_dataframe(tiny_base):
    frame = forecast_frame(_long(12), 2, base=tiny_base(), samples=3)
    assert len(frame) == 8 and np.isfinite(frame.drop(columns=["item", "day", "target_name"]).to_numpy()).all()


def test_a_wide_frame_keeps_names_and_times(ramp, tiny_base):
    made = forecast_table(tiny_base(), table_of(_long()), 2, samples=3)
    frame = wide_frame(made)
    assert list(frame.columns) == ["item", "sample", "step", "day", "hare", "lynx"] and len(frame) == 12
    bands = wide_frame(made, [0.1, 0.9])
    assert list(bands.columns) == ["item", "step", "day", "hare_0.1", "hare_0.9", "lynx_0.1", "lynx_0.9"]
    assert (bands["hare_0.1"] < bands["hare_0.9"]).all() and len(bands) == 4
    single = forecast_table(tiny_base(), table_of(pd.DataFrame({"step": np.sin(np.arange(9.0))})), 2)
    assert list(wide_frame(single).columns) == ["series", "sample", "step_", "step"]


def test_a_large_level_keeps_its_digits(tiny_base):
    table = table_of(pd.DataFrame({"a": 1e9 + np.sin(np.arange(20)) / 100}))
    paths = 1e9 + np.array([[[0.001234], [0.002345]]])
    (history,) = table.histories
    frame = wide_frame(Forecasts(table, [Outlook(history, None, paths)]))
    np.testing.assert_allclose(frame["a"] - 1e9, [0.001234, 0.002345], atol=1e-6)


# ---------------------------------------------------------------- held back


def test_the_last_rows_are_held_back(ramp, tiny_base):
    made = forecast_held_back(tiny_base(), table_of(_long()), 3, windows=2)
    values, days = _long().query("item == 'x'")["hare"].to_numpy(), pd.date_range("2021-01-01", periods=20)
    first, second = made.outlooks[:2]
    np.testing.assert_array_equal(first.truth[:, 0], values[14:17])
    np.testing.assert_array_equal(second.truth[:, 0], values[17:])
    assert list(first.times) == list(days[14:17]) and list(second.times) == list(days[17:])
    np.testing.assert_array_equal(first.history.values[:, 0], values[:14])
    with pytest.raises(UserError, match=r"series x has 20 rows; 6 windows of 3 steps need 21"):
        forecast_held_back(tiny_base(), table_of(_long()), 3, windows=6)
    with pytest.raises(UserError, match=r"cannot hold back 0 windows"):
        forecast_held_back(tiny_base(), table_of(_long()), 3, windows=0)


def test_errors_stand_beside_simple_forecasts(ramp, tiny_base):
    frame = backtest(_long(), 3, 2, base=tiny_base(), samples=0)
    assert frame["method"].tolist() == ["this model", "last value", "last season", "context parroting"] * 2
    by = frame.set_index(["target_name", "method"])
    values = _long().query("item == 'x'")["hare"].to_numpy()
    errors = np.abs(np.concatenate([values[14:17] - values[13], values[17:] - values[16]])) * [[1], [2]]
    assert by.loc[("hare", "last value"), "mae"] == pytest.approx(errors.mean())
    assert by.loc[("hare", "this model"), "mae"] == pytest.approx(errors.mean(), rel=1e-6)  # the fixture repeats it
    assert by.loc[("hare", "last value"), ["to_last_value", "windows"]].tolist() == [1, 4]
    assert "coverage_80" not in frame


def test_coverage_is_the_share_within_the_band():
    table = table_of(pd.DataFrame({"a": np.arange(10.0) ** 2}))
    (history,) = table.histories
    paths = np.arange(11.0)[:, np.newaxis, np.newaxis].repeat(4, axis=1)  # 0 … 10 at each step: the band is 1 to 9
    outlook = Outlook(history, None, paths, truth=np.array([[0.5], [1.0], [9.0], [30.0]]))
    frame = scores(Forecasts(table, [outlook]))
    assert frame["coverage_80"].tolist()[0] == 0.5 and frame["coverage_80"].isna().tolist() == [False, True, True, True]
    assert frame["mae"][0] == pytest.approx(np.mean([4.5, 4, 4, 25]))


def test_a_forecast_that_is_not_whole_is_not_measured():
    table = table_of(pd.DataFrame({"a": np.arange(10.0) ** 2}))
    paths = np.array([[[1.0], [np.nan]]])
    with pytest.raises(UserError, match=r"no forecast is whole, so none can be measured; add --constrained"):
        scores(Forecasts(table, [Outlook(table.histories[0], None, paths, truth=np.ones((2, 1)))]))
