"""Scaling: a level and a scale for each column."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from m2helpers.series.scaling import FLOOR, find_spike, fit_scaling


def test_each_column_has_its_own_scale():
    values = np.stack([np.linspace(1e6, 2e7, 50), np.linspace(0.01, 0.13, 50)], axis=1)
    written = fit_scaling(values).write(values)
    np.testing.assert_allclose(np.percentile(written, 99.7, axis=0), 10)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_large_level_is_taken_out(sign):
    values = sign * (1013 + 0.4 * np.sin(np.arange(60) / 3))[:, np.newaxis]
    written = sign * fit_scaling(values).write(values)
    assert written.min() / np.ptp(written) == pytest.approx(FLOOR) and written.max() == pytest.approx(10, rel=1e-3)


@pytest.mark.parametrize("values", [[7.25, 7.25, 7.25], [0.0, 0, 0], [0, 1, 2], [-1, 0, 3]])
def test_nothing_is_taken_out_near_zero_or_of_a_constant(values):
    scaling = fit_scaling(np.array(values, float)[:, np.newaxis])
    assert scaling.level[0] == 0 and np.isfinite(scaling.scale[0])


@pytest.mark.slow
@given(st.lists(st.floats(-1e12, 1e12), min_size=3, max_size=400), st.sampled_from([1e-9, 1.0, 1e9]))
def test_what_is_written_fits_the_text_and_comes_back(values, unit):
    column = unit * np.array(values)[:, np.newaxis]
    scaling = fit_scaling(column)
    written = scaling.write(column)
    assert np.abs(written).max() < 999
    np.testing.assert_allclose(scaling.read(written), column, atol=1e-9 * np.abs(column).max())


def test_a_spike_is_found_and_a_burst_is_none():
    values = np.stack([2 + np.sin(np.arange(100.0)), np.arange(100.0)], axis=1)
    assert find_spike(values) is None
    values[40, 0] = 5000
    row, column, times = find_spike(values)
    assert (row, column) == (40, 0) and 1000 < times < 5000
    rare = np.zeros((100, 1))
    rare[50] = 3  # counts, mostly zero
    assert find_spike(rare) is None
