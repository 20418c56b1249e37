"""Simple forecasts: the last season, and what followed the nearest past motif."""

import numpy as np
import pytest

from m2helpers.evaluation.naive import parrot, season_length, seasonal_naive


def _wave(n, period=12):
    t = np.arange(n)
    return np.stack([np.sin(2 * np.pi * t / period), np.cos(2 * np.pi * t / period)], axis=1)


@pytest.mark.parametrize("period", [4, 7, 12, 24])
def test_a_season_is_found_and_repeated(period):
    wave = _wave(5 * period + 3, period)
    assert season_length(wave) == period
    np.testing.assert_allclose(seasonal_naive(wave, 30), _wave(5 * period + 33, period)[-30:], atol=1e-9)


@pytest.mark.parametrize("context", [np.ones((20, 1)), np.arange(20.0)[:, None], np.ones((2, 1))])
def test_without_a_season_the_last_value_is_repeated(context):
    assert season_length(context) == 1
    np.testing.assert_array_equal(seasonal_naive(context, 3), np.repeat(context[-1:], 3, axis=0))


def test_noise_has_no_season():
    assert season_length(np.random.default_rng(0).normal(size=(400, 1))) == 1


def test_a_parrot_copies_what_followed_the_nearest_motif():
    series = np.concatenate([np.arange(30.0) % 7, [50.0], np.arange(30.0) ** 2, [3, 4, 5, 6, 0, 1, 2, 3, 4, 5]])[
        :, None
    ]
    motif = np.array([3, 4, 5, 6, 0, 1, 2, 3, 4, 5.0])
    assert (series[-10:, 0] == motif).all()
    np.testing.assert_array_equal(parrot(series, 4)[:, 0], [6, 0, 1, 2])


def test_a_parrot_goes_on_past_the_end_of_what_it_knows():
    wave = _wave(25, 12)
    np.testing.assert_allclose(parrot(wave, 40), _wave(65, 12)[-40:], atol=1e-9)


def test_each_variable_counts_by_its_own_spread():
    """The second is a thousand times smaller: the noise on the first would drown it."""
    noise = np.random.default_rng(1).normal(size=66)
    both = np.stack([np.tile([0.0, 1000.0, 3000.0], 22) + noise, _wave(66, 12)[:, 0]], axis=1)
    np.testing.assert_allclose(parrot(both[:61], 5)[:, 1], both[61:, 1], atol=1e-9)


def test_a_parrot_of_two_steps_repeats_the_last():
    np.testing.assert_array_equal(parrot(np.array([[1.0], [2.0]]), 2), [[2], [2]])
