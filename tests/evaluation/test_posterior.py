"""What a context tells of a system: the bounds that its text sets, and draws held against brute force and against themselves."""

import numpy as np
import pytest

from m2helpers.data import load_dataset
from m2helpers.evaluation.bounds import read_window
from m2helpers.evaluation.floor import MIXED
from m2helpers.evaluation.posterior import _known, _misfits, _points, _seen, sample, split_rhat
from m2helpers.simulator import integrate, law_of
from m2helpers.text import Codec, fit_scale

CODEC = Codec(1.0)


@pytest.fixture(scope="module")
def law():
    return law_of(load_dataset())


def test_a_text_bounds_the_values_that_it_shows():
    reading = read_window("1.16,0.27;10.90,0.", CODEC, begins=True)
    np.testing.assert_array_equal(reading.low, [[115.5, 26.5], [1089.5, -np.inf]])
    np.testing.assert_array_equal(reading.high, [[116.5, 27.5], [1090.5, np.inf]])
    assert reading.lattice == (1, 0) and reading.last == (1, 1) and reading.unit == 100
    np.testing.assert_array_equal(reading.pieces, [[-0.5, 99.5]])


@pytest.mark.parametrize(
    ("number", "pieces"),
    [
        ("", np.empty((0, 2))),
        ("1.2", [[119.5, 129.5]]),
        ("1.23", [[122.5, 123.5]]),
        ("0", [[-0.5, 99.5]]),
        ("1", [[99.5, 199.5], [999.5, 1999.5], [9999.5, 19999.5]]),
    ],
)
def test_a_number_that_is_cut_at_the_end_is_known_by_its_first_digits(number, pieces):
    np.testing.assert_array_equal(read_window(f"1.16,{number}", CODEC, begins=True).pieces, pieces)


@pytest.mark.parametrize(
    ("text", "first", "lattice"),
    [("27,0.95;1.00,", (0, 0), (100, 27)), (";1.00,", (0, 1), (1, 0)), ("7;1.00,", (0, 1), (10, 7))],
)
def test_a_number_that_is_cut_at_the_beginning_is_known_by_its_last_digits(text, first, lattice):
    reading = read_window(text, CODEC, begins=False)
    assert (reading.first, reading.lattice) == (first, lattice)
    assert not np.isfinite(reading.low[first])


def test_the_system_that_wrote_a_window_breaks_no_bound_and_a_neighbour_does(law):
    codec = Codec(1.2)
    systems = law.draw(6, 11)
    paths = integrate(systems.T[:6], systems.T[6:], 30, law.dt).transpose(2, 0, 1)  # (6, 30, 2)
    for system, path in zip(systems, paths, strict=True):
        text = codec.encode(path)
        for cut, begins in ((0, True), (12, False)):
            step = text[:cut].count(";")
            reading = read_window(text[cut : cut + 128], codec, begins=begins)
            start = np.concatenate([system[:6], path[step]])
            points = _points(np.stack([start, start * [1.01, 1, 1, 1, 1, 1, 1, 1]]))
            right, wrong = _misfits(points, _known(law, begins), _seen(reading))
            assert right < 1e-3 < wrong


def test_text_that_is_no_such_series_is_refused():
    from m2helpers.files import UserError

    with pytest.raises(UserError, match="no text of a series of two non-negative variables"):
        read_window("1.16,-0.27;", CODEC, begins=True)


def test_split_rhat_tells_chains_apart():
    values = np.random.default_rng(0).normal(size=(200, 10, 1))
    assert split_rhat(values) < 1.02
    values[:, 0] += 3
    assert split_rhat(values) > 1.2


@pytest.mark.slow
def test_draws_agree_with_brute_force(law):
    """A short context at one decimal is met by about one system in a hundred: those that meet it are the posterior."""
    codec, steps = Codec(0.6, precision=1), 6
    truth = law.draw(1, 5)
    written = codec.encode(integrate(truth.T[:6], truth.T[6:], 3, law.dt)[..., 0])
    systems = law.draw(400_000, 6)
    paths = integrate(systems.T[:6], systems.T[6:], steps, law.dt)  # (steps, 2, n)
    same = (codec.rounded(paths[:3]) == codec.decode(written, 2).values[..., None]).all(axis=(0, 1))
    expected = paths[3:, :, same].transpose(2, 0, 1)  # (systems that meet it, 3, 2)
    assert len(expected) > 1000
    draws = sample(law, read_window(written, codec, begins=True), range(3, 6), seed=[0], mixed=MIXED)
    assert draws.rhat < MIXED
    spread = expected.std(axis=0)
    np.testing.assert_allclose(draws.future.mean(axis=0), expected.mean(axis=0), atol=0.1 * spread.max())
    levels = [0.1, 0.5, 0.9]
    away = np.quantile(draws.future, levels, axis=0) - np.quantile(expected, levels, axis=0)
    assert (np.abs(away) < 0.15 * spread).all(), (away / spread).round(2)


@pytest.mark.slow
@pytest.mark.long
def test_ranks_of_the_truth_are_even(law):
    """Simulation-based calibration (Talts et al., 2018): 60 systems drawn from the law, the truth's rank among the draws."""
    codec = Codec(fit_scale(load_dataset().part("train")))
    systems = law.draw(60, 21)
    paths = integrate(systems.T[:6], systems.T[6:], 30, law.dt).transpose(2, 0, 1)
    ranks = []
    for index, path in enumerate(paths):
        context = codec.encode(path)[:128]
        first = context.count(";") + 1
        draws = sample(
            law, read_window(context, codec, begins=True), range(first, first + 5), seed=[1, index], mixed=MIXED
        )
        if draws.rhat < MIXED:
            ranks.append((draws.future < path[first : first + 5]).mean(axis=0).ravel())
    ranks = np.array(ranks)  # (windows, 10)
    assert len(ranks) > 45
    # Values of one window hang together, so each is held against evenness by itself: Kolmogorov's distance at 0.1 %.
    for column in ranks.T:
        ordered = np.sort(column)
        distance = np.abs(ordered - (np.arange(len(ordered)) + 0.5) / len(ordered)).max()
        assert distance < 1.95 / np.sqrt(len(ordered)), ordered.round(2)
