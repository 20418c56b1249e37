"""The table of classic series: errors and wins by hand, methods on series they must be right about, and what the page says."""

import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from m2helpers.experiments import classic
from m2helpers.experiments.classic import AHEAD, CONTEXT, METHODS, OURS, Classic, Comparison
from m2helpers.report import pages

WAVE = np.sin(2 * np.pi * np.arange(120) / 12)[:, None]


def _comparison():
    """Two variables in units a thousand apart; the base is off by 1 and by 2000 on one window, and wrote nothing on the other."""
    values = np.zeros((CONTEXT + 2 * AHEAD, 2))
    series = Classic("made up", values, 1)
    off = lambda a, b: np.broadcast_to([a, 1000.0 * b], (AHEAD, 2))  # noqa: E731
    return Comparison(
        series, {OURS: [off(1, 2), None], "last value": [off(4, 4), off(9, 9)], "ARIMA": [off(2, 0.5), off(0, 0)]}
    )


def test_errors_and_wins_count_each_variable_in_its_own_unit_and_whole_windows_alone():
    comparison = _comparison()
    assert comparison.classic.ends == [CONTEXT + AHEAD, CONTEXT] and comparison.valid == 1
    assert comparison.errors() == pytest.approx(
        {OURS: (1 / 4 + 2 / 4) / 2, "last value": 1, "ARIMA": (2 / 4 + 0.5 / 4) / 2}
    )
    assert comparison.duels() == {"last value": (1, 0), "ARIMA": (0, 1)}
    nothing = Comparison(comparison.classic, comparison.forecasts | {OURS: [None, None]})
    assert np.isnan(list(nothing.errors().values())).all() and nothing.duels() == {}


@pytest.mark.parametrize("method", ["seasonal naive", "context parroting", "ETS"])
def test_a_season_is_carried_on(method):
    made = METHODS[method](np.hstack([WAVE, 5 - 2 * WAVE])[:CONTEXT], 12)
    truth = WAVE[CONTEXT : CONTEXT + AHEAD]
    np.testing.assert_allclose(made, np.hstack([truth, 5 - 2 * truth]), atol=1e-2)


def test_arima_carries_a_line_on():
    line = np.arange(CONTEXT + AHEAD, dtype=float)[:, None] * [1, -3]
    noise = np.random.default_rng(0).normal(0, 1e-3, (CONTEXT, 2))
    made = METHODS["ARIMA"](line[:CONTEXT] + noise, 1)
    np.testing.assert_allclose(made, line[CONTEXT:], atol=1)


def test_the_base_sees_what_the_others_see(monkeypatch):
    seen = []

    def forecast_table(base, table, steps, codec):
        seen.extend(history.values for history in table.histories)
        outlooks = [SimpleNamespace(problem="", paths=np.zeros((1, steps, 1))) for _ in table.histories]
        outlooks[0].paths = np.full((1, steps, 1), np.nan)
        return SimpleNamespace(outlooks=outlooks)

    monkeypatch.setattr(classic, "forecast_table", forecast_table)
    series = Classic("wave", WAVE, 12)
    first, *rest = classic.by_base(None, series)
    assert first is None and len(rest) == len(series.ends) - 1 == 6 and rest[0].shape == (AHEAD, 1)
    for context, end in zip(seen, series.ends, strict=True):
        np.testing.assert_array_equal(context, WAVE[end - CONTEXT : end])


def test_the_page_shows_wins_and_losses_from_the_record(tmp_path, monkeypatch):
    monkeypatch.setattr(classic, "machine", lambda: "a machine")
    monkeypatch.setattr(pages, "SHIPPED_CLASSICS", tmp_path / "classic.json")
    assert pages.classic_table() == "No forecast of classic series has been recorded."
    base = SimpleNamespace(short_name="embedded", sha256="b")
    rows = classic.record_classics(base, [_comparison(), _comparison()], tmp_path / "classic.json")
    assert json.loads((tmp_path / "classic.json").read_text())["rows"] == json.loads(json.dumps(rows))
    table = pages.classic_table()
    assert "| error, last value = 1 | windows | embedded base | last value | ARIMA |" in table
    assert "| made up | 1 of 2 | 0.38 | 1.00 | **0.31** |" in table
    assert "| *windows that the base wins / loses against it* | 4 | | 2 / 0 | 0 / 2 |" in table
    assert "better than last value on 2, ARIMA on 0 of 2 series" in table and "a machine" in table


def test_the_public_series_are_there():
    series = classic.classic_series()
    assert [s.values.shape[1] for s in series] == [1, 1, 1, 1, 3, 2]
    assert [len(s.ends) for s in series] == [10, 10, 10, 5, 10, 5]
    assert all(np.isfinite(s.values).all() for s in series) and pd.Series([s.name for s in series]).is_unique
