"""Distributions of cells: against numerical integration, another library, and samples drawn from them."""

import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from m2helpers.forecasting import Distribution
from m2helpers.series.scaling import fit_scaling
from m2helpers.text import Codec

FINE = np.linspace(-0.5, 0.5, 81)[1::2]  # middles of forty parts of a cell


def _draw(seed, n=12, steps=3, width=(0.1, 5.0), level=(0.0, 1000.0)):
    """Cells of two variables of unlike size, with weights, as paths and as a distribution; and a truth off the grid."""
    rng = np.random.default_rng(seed)
    numbers = rng.integers(-6, 7, (n, steps, 2))
    paths, weights = numbers * np.array(width) + level, rng.uniform(0.1, 3, n)
    truth = rng.uniform(-9, 9, (steps, 2)) * width + level
    return paths, weights, truth, Distribution.from_paths(paths, width, level, weights)


def _spread(paths, weights, width):
    """Many equal-spaced members for each path, and their weights: the distribution as a weighted ensemble, (steps, variables, members)."""
    members = (paths[..., np.newaxis] + FINE * np.array(width)[:, np.newaxis]).transpose(1, 2, 0, 3)
    return members.reshape(*members.shape[:2], -1), np.repeat(weights / weights.sum() / len(FINE), len(FINE))


@pytest.mark.parametrize("seed", range(5))
def test_the_score_is_the_integral(seed):
    """Integrated by the trapezoidal rule over a grid that holds every kink, with nothing of the closed form."""
    width = (0.1, 5.0)
    paths, weights, truth, made = _draw(seed)
    score = made.crps(truth)
    for step in range(3):
        for i in range(2):
            low, high = paths[:, step, i] - width[i] / 2, paths[:, step, i] + width[i] / 2
            y = truth[step, i]
            parts = np.unique(np.concatenate([low, high, [y, y - 20 * width[i], y + 20 * width[i]]]))
            x = np.unique(np.concatenate([np.linspace(a, b, 400) for a, b in pairwise(parts)]))
            middle = (x[1:] + x[:-1]) / 2
            below = np.clip((middle[:, np.newaxis] - low) / width[i], 0, 1) @ (weights / weights.sum())
            wanted = ((below - (middle >= y)) ** 2 * np.diff(x)).sum()
            assert score[step, i] == pytest.approx(wanted, rel=1e-5)


@pytest.mark.slow
def test_the_score_is_that_of_another_library():
    import scoringrules  # takes seconds

    paths, weights, truth, made = _draw(7)
    members, shares = _spread(paths, weights, (0.1, 5.0))
    many = np.broadcast_to(shares, members.shape)
    theirs = scoringrules.crps_ensemble(truth, members, ens_w=many, estimator="nrg")
    np.testing.assert_allclose(made.crps(truth), theirs, rtol=1e-3)
    on_grid = np.rint((truth - [0, 1000]) / [0.1, 5]) * [0.1, 5] + [0, 1000]
    few = np.broadcast_to(weights / weights.sum(), (3, 2, 12))
    theirs = scoringrules.crps_ensemble(on_grid, paths.transpose(1, 2, 0), ens_w=few, estimator="nrg")
    np.testing.assert_allclose(made.crps_discrete(truth), theirs, rtol=1e-9, atol=1e-12)


def test_the_right_cell_scores_nothing_and_any_other_its_distance():
    sure = Distribution.from_paths(np.full((4, 1, 1), 1.27), 0.01)
    assert sure.crps_discrete([[1.27]])[0, 0] == pytest.approx(0, abs=1e-15)
    assert sure.crps_discrete([[1.30]])[0, 0] == pytest.approx(0.03)
    assert sure.crps([[1.27]])[0, 0] == pytest.approx(0.01 / 12)  # of a uniform distribution, at its middle
    assert sure.probability([[1.274]])[0, 0] == 1 and sure.probability([[1.276]])[0, 0] == 0


def test_figures_are_those_of_the_spread_members():
    paths, weights, truth, made = _draw(3)
    members, shares = _spread(paths, weights, (0.1, 5.0))
    np.testing.assert_allclose(made.mean, (members * shares).sum(-1), rtol=1e-9)
    np.testing.assert_allclose(made.cdf(truth), ((members < truth[..., np.newaxis]) * shares).sum(-1), atol=0.03)
    order = members.argsort(-1)
    up_to = shares[order].cumsum(-1)
    ranked = np.take_along_axis(members, order, -1)
    for level in (0.05, 0.31, 0.5, 0.77):
        place = (up_to < level).sum(-1)[..., np.newaxis]
        wanted = np.take_along_axis(ranked, place, -1)[..., 0]
        np.testing.assert_allclose(made.quantile(level)[0], wanted, atol=0.03 * 5)
    np.testing.assert_array_equal(made.median, made.quantile([0.5])[0])


@pytest.mark.slow
@given(
    st.lists(st.tuples(st.integers(-50, 50), st.floats(0.01, 1)), min_size=1, max_size=9, unique_by=lambda c: c[0]),
    st.floats(0.001, 0.999),
)
def test_a_quantile_undoes_the_distribution_function(cells, level):
    numbers, mass = (np.array(column) for column in zip(*cells, strict=True))
    made = Distribution.from_cells([[(numbers, mass)]], 0.25, -3.0)
    value = made.quantile([level])
    assert made.cdf(value[0])[0, 0] == pytest.approx(level, abs=1e-8)
    low, high = made.quantile([0, 1])[:, 0, 0]
    assert low == numbers.min() * 0.25 - 3.125 and high == pytest.approx(numbers.max() * 0.25 - 2.875)


def test_an_even_number_of_samples_has_the_median_that_samples_have():
    samples = np.array([1.0, 2.0, 7.0, 9.0])
    made = Distribution.from_paths(samples[:, np.newaxis, np.newaxis], 0.01)
    assert made.median[0, 0] == pytest.approx(np.median(samples))


def test_the_transform_of_what_was_drawn_is_even():
    """Truths drawn from the distributions themselves: every tenth of [0, 1] is met as often, on and off the grid."""
    rng = np.random.default_rng(0)
    numbers, mass = np.arange(-3, 4), np.array([1, 5, 2, 9, 4, 4, 1]) / 26
    made = Distribution.from_cells([[(numbers, mass)]] * 4000, 0.5, 2.0)
    drawn = rng.choice(numbers, 4000, p=mass)
    continuous = made.pit(((drawn + rng.uniform(-0.5, 0.5, 4000)) * 0.5 + 2)[:, np.newaxis])[:, 0]
    low, high = made.pit_discrete((drawn * 0.5 + 2.0)[:, np.newaxis])[..., 0]
    np.testing.assert_allclose(high - low, made.probability((drawn * 0.5 + 2.0)[:, np.newaxis])[:, 0], rtol=1e-9)
    edges = np.linspace(0, 1, 11)
    shares = (np.clip(edges[1:], low[:, np.newaxis], high[:, np.newaxis])
              - np.clip(edges[:-1], low[:, np.newaxis], high[:, np.newaxis])) / (high - low)[:, np.newaxis]  # fmt: skip
    for counts in (np.histogram(continuous, edges)[0], shares.sum(0)):
        assert ((counts - 400) ** 2 / 400).sum() < 25  # chi-square of nine degrees: 21.7 at 1 %


def test_units_change_figures_as_they_change_values():
    """A table's own scaling, read back: quantiles and scores are those of the text, in the table's units."""
    values = 1013 + np.sin(np.arange(40.0))[:, np.newaxis] * [0.4, 3e6]
    scaling = fit_scaling(values)
    rng = np.random.default_rng(1)
    written = np.round(rng.uniform(1, 9, (20, 2, 2)), 2)
    text = Distribution.from_paths(written, Codec(1.0).resolution)
    own = Distribution.from_paths(scaling.read(written), Codec(1.0).resolution / scaling.scale, scaling.level)
    levels, truth = [0.1, 0.42, 0.9], rng.uniform(1, 9, (2, 2))
    np.testing.assert_allclose(scaling.write(own.quantile(levels)), text.quantile(levels), rtol=1e-7)
    np.testing.assert_allclose(own.crps(scaling.read(truth)), text.crps(truth) / scaling.scale, rtol=1e-6)
    assert Codec(0.5, 3).resolution == 0.002


def test_a_step_has_the_paths_that_reach_it():
    paths = np.array([[[1.0], [5.0]], [[3.0], [np.nan]], [[3.0], [np.nan]]])
    made = Distribution.from_paths(paths, 0.5)
    np.testing.assert_allclose(made.mean[:, 0], [7 / 3, 5.0])
    none = Distribution.from_paths(np.where(np.arange(2)[:, np.newaxis] == 1, np.nan, paths), 0.5)
    figures = [none.quantile([0.1, 0.9])[0], none.mean, none.cdf(paths[0]), none.crps(paths[0]), none.pit(paths[0])]
    for figure in [*figures, none.pit_discrete(paths[0])[1], none.crps_discrete(paths[0]), none.probability(paths[0])]:
        assert np.isfinite(figure[0]).all() and np.isnan(figure[1]).all()


def test_later_steps_alone():
    _, _, truth, made = _draw(2)
    pruned = Distribution(made.cells, made.mass, made.width, made.level, np.array([0.0, 1e-4, 2e-4]))
    np.testing.assert_array_equal(pruned[1:].crps(truth[1:]), made.crps(truth)[1:])
    assert pruned[1:].pruned.tolist() == [1e-4, 2e-4] and made.pruned.tolist() == [0, 0, 0]


def test_no_torch_is_needed():
    code = "import sys; from m2helpers.forecasting import Distribution; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
