"""A model that is easily foreseen, and a table in long form."""

import numpy as np
import pandas as pd
import pytest

from m2helpers.outlooks import tables


@pytest.fixture
def ramp(monkeypatch):
    """A model whose samples are the last values plus 1, 2, 3, ... hundredths of the text, and whose likeliest is the last."""

    def sample(base, codec, series, steps, n_samples, **_):
        ahead = [np.repeat(values[-1:], steps, axis=0) for values in series]
        return [np.stack([values + 0.01 * i for i in range(n_samples)]) for values in ahead]

    def forecast(base, codec, series, steps, **_):
        return [type("F", (), {"values": np.repeat(values[-1:], steps, axis=0)}) for values in series]

    monkeypatch.setattr(tables, "sample_many", sample)
    monkeypatch.setattr(tables, "forecast", forecast)


@pytest.fixture
def long():
    """Makes a table of two series of two variables, one below the other."""
    return _long


def _long(n=20):
    days = pd.date_range("2021-01-01", periods=n, freq="D")
    values = 2 + np.sin(np.arange(n) / 3)
    parts = [
        pd.DataFrame({"item": name, "day": days, "hare": values * i, "lynx": values + i})
        for i, name in ((1, "x"), (2, "y"))
    ]
    return pd.concat(parts, ignore_index=True)
