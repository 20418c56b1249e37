"""Thinning of weighted paths: unbiased, of the number asked for, and the heavy ones untouched."""

import numpy as np
import pytest

from m2helpers.forecasting.resampling import resample
from m2helpers.forecasting.trees import _thinned

WEIGHTS = np.array([0.3, 0.02, 0.05, 0.2, 0.01, 0.07, 0.1, 0.25])


@pytest.mark.parametrize("n", [1, 3, 5, 7])
def test_expectations_stay(n):
    total = np.zeros(len(WEIGHTS))
    turns = (np.arange(4000) + 0.5) / 4000
    for uniform in turns:
        chosen, weights = resample(WEIGHTS, n, uniform)
        assert len(chosen) == n and (np.diff(chosen) > 0).all() and weights.sum() == pytest.approx(1)
        total[chosen] += weights / len(turns)
    np.testing.assert_allclose(total, WEIGHTS, atol=1e-3)
    heavy = np.flatnonzero(weights.min() * (1 + 1e-9) <= WEIGHTS)
    assert set(heavy) <= set(chosen) and weights[np.isin(chosen, heavy)] == pytest.approx(WEIGHTS[heavy])


def test_few_stay_all():
    chosen, weights = resample(WEIGHTS, 8, 0.5)
    assert chosen.tolist() == list(range(8)) and (weights == WEIGHTS).all()
    even = resample(np.full(10, 0.1), 4, 0.3)
    assert len(even[0]) == 4 and even[1] == pytest.approx([0.25] * 4)


def test_branches_are_thinned_within_their_window():
    mass = np.array([[0.5, 0.01, 0.0], [0.02, 0.07, 0.05], [0.03, 0.9, 0.01]])
    window = np.array([4, 4, 7])
    total, turns = np.zeros(mass.shape), (np.arange(1000) + 0.5) / 1000
    for number in turns:
        uniform = np.full(8, 0.123)
        uniform[4] = number  # of one window: the other's choice stays
        made = _thinned(mass, window, 0.06, uniform)
        assert (made[mass >= 0.06] == mass[mass >= 0.06]).all() and set(made[mass < 0.06]) <= {0.0, 0.06}
        total += made / len(turns)
    np.testing.assert_allclose(total[:2], mass[:2], atol=1e-3)
    assert len(set(total[2])) == 3 or total[2, 0] in (0.0, 0.06)
    alone = _thinned(mass[2:], window[2:], 0.06, uniform)
    np.testing.assert_array_equal(alone, made[2:])
