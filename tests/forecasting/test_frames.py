"""A DataFrame in, a DataFrame of predictions out."""

import numpy as np
import pandas as pd
import pytest

from m2helpers.forecasting import LEVELS, Forecasts, Outlook, forecast_frame, forecast_table, wide_frame
from m2helpers.series import table_of


def test_predictions_in_the_manner_of_predict_df(ramp, long, tiny_base):
    frame = forecast_frame(long(), 3, base=tiny_base(), samples=11)
    assert list(frame.columns) == ["item", "day", "target_name", "predictions", *(f"{level:g}" for level in LEVELS)]
    assert (
        frame["item"].tolist() == ["x"] * 6 + ["y"] * 6
        and frame["target_name"].tolist() == (["hare"] * 3 + ["lynx"] * 3) * 2
    )
    assert frame["day"][:3].tolist() == list(pd.date_range("2021-01-21", periods=3))
    assert (frame["predictions"] == frame["0.5"]).all() and (np.diff(frame[["0.1", "0.5", "0.9"]]) > 0).all()
    assert "2 series x, y by item; 2 variables hare, lynx; day taken as time" in frame.attrs["notices"][0]


def test_columns_and_levels_can_be_said(ramp, long, tiny_base):
    data = long().query("item == 'x'").assign(note=1.0)
    frame = forecast_frame(
        data, 2, base=tiny_base(), id_column="item", time_column="day", targets=["lynx"], levels=[0.25], samples=4
    )
    assert list(frame.columns) == ["item", "day", "target_name", "predictions", "0.25"]
    assert set(frame["target_name"]) == {"lynx"}
    plain = forecast_frame(data[["lynx"]], 2, base=tiny_base(), samples=0)
    assert plain[["step", "target_name"]].values.tolist() == [[1, "lynx"], [2, "lynx"]]
    assert list(plain.columns) == ["step", "target_name", "predictions"]
    np.testing.assert_allclose(plain["predictions"], data["lynx"].iloc[-1])


def test_the_real_model_on_a_dataframe(long, tiny_base):
    frame = forecast_frame(long(12), 2, base=tiny_base(), samples=3)
    assert len(frame) == 8 and np.isfinite(frame.drop(columns=["item", "day", "target_name"]).to_numpy()).all()


def test_a_wide_frame_keeps_names_and_times(ramp, long, tiny_base):
    made = forecast_table(tiny_base(), table_of(long()), 2, samples=3)
    frame = wide_frame(made)
    assert list(frame.columns) == ["item", "sample", "step", "day", "hare", "lynx"] and len(frame) == 12
    bands = wide_frame(made, [0.1, 0.9])
    assert list(bands.columns) == ["item", "step", "day", "hare_0.1", "hare_0.9", "lynx_0.1", "lynx_0.9"]
    assert (bands["hare_0.1"] < bands["hare_0.9"]).all() and len(bands) == 4
    single = forecast_table(tiny_base(), table_of(pd.DataFrame({"step": np.sin(np.arange(9.0))})), 2)
    assert list(wide_frame(single).columns) == ["series", "sample", "step_", "step"]


@pytest.mark.parametrize("size, level", [(1e-9, 0.0), (1.0, 0.0), (0.01, 1e7), (1e9, 0.0)])
def test_a_forecast_has_a_digit_more_than_its_text(size, level):
    table = table_of(pd.DataFrame({"a": level + size * np.sin(np.arange(20))}))
    paths = level + size * np.array([[[0.123456789], [0.234567891]]])
    (history,) = table.histories
    frame = wide_frame(Forecasts(table, [Outlook(history, None, paths, resolution=size / 100)]))
    np.testing.assert_allclose((frame["a"] - level) / size, [0.123, 0.235], atol=2e-6)
