"""The pre-training mixture: no predator–prey system in it, repeatable, sound and varied."""

import inspect
import re

import numpy as np
import pytest

from m2helpers.pretraining import dynamics, families
from m2helpers.pretraining.dynamics import gaussian_process
from m2helpers.pretraining.families import FAMILIES
from m2helpers.pretraining.synthetic import draw_series, draw_texts
from m2helpers.text import Codec

NAMES = {
    "activator_inhibitor",
    "chaotic_flows",
    "damped_oscillations",
    "exponential_oscillations",
    "exponential_springs",
    "exponential_systems",
    "feedback_loops",
    "glycolysis",
    "limit_cycle_normal_form",
    "linear_systems",
    "nonlinear_oscillators",
    "pendulums_and_springs",
    "products",
    "relaxation_oscillators",
    "schnakenberg",
    "thermokinetics",
    "without_cycles",
}
PREDATOR_PREY = r"predat|prey|lotka|volterra|rosenzweig|macarthur|holling|leslie|gower|consumer|lynx|\bhare\b"


@pytest.fixture(scope="module")
def two_decimals():
    return draw_texts([1], 480, 120, precision=2)


@pytest.fixture(scope="module")
def mixed():
    return draw_texts([1], 480, 120)


def _steps(text, precision):
    """Whole steps of a text that may begin inside a number: (steps, variables), and what is left at its end."""
    whole = text.partition(";")[2]
    n_variables = whole.partition(";")[0].count(",") + 1
    decoded = Codec(1.0, precision).decode(whole, n_variables)
    return decoded.values, whole[decoded.stop :]


def test_the_mixture_is_these_families_and_none_is_a_predator_prey_system():
    assert set(FAMILIES) == NAMES and len(FAMILIES) >= 16
    functions = dict(
        inspect.getmembers(families, inspect.isfunction) + inspect.getmembers(dynamics, inspect.isfunction)
    )
    assert len(functions) > len(NAMES)
    for name, function in functions.items():
        assert not re.search(PREDATOR_PREY, inspect.getsource(function), re.IGNORECASE), name


def test_competitors_only_ever_harm_each_other():
    """The one family of two species: neither gains from the other, so it is no predator–prey system in disguise."""
    source = inspect.getsource(dynamics.two_species_competition)
    assert "speed * s * (1 - s - pressure * s[::-1])" in source and "uniform(0.3, 1.6" in source


@pytest.mark.parametrize("name", sorted(NAMES))
def test_every_family_yields_finite_and_varied_series(name):
    series = draw_series(np.random.default_rng(3), 12, 80, name)
    assert len(series) == 12
    for values in series:
        assert values.shape[0] == 80 and values.shape[1] in (1, 2, 3)
        assert np.isfinite(values).all() and np.abs(values).max() < 1000
        assert (np.ptp(values, axis=0) > 0).all()
    first = [values[:, 0] for values in series]
    assert len({column.tobytes() for column in first}) == 12  # twelve different series


@pytest.mark.slow
def test_one_seed_draws_one_mixture():
    assert draw_texts([4, 1], 48, 60) == draw_texts([4, 1], 48, 60)
    assert not set(draw_texts([4, 1], 48, 60)) & set(draw_texts([4, 2], 48, 60))


@pytest.mark.slow
@pytest.mark.parametrize("precision", [0, 1, 2, 3])
def test_texts_follow_the_grammar(precision):
    texts = draw_texts([0], 48, 200, precision=precision)
    assert len(texts) == 48 and max(map(len, texts)) == 200
    for text in texts:
        values, rest = _steps(text, precision)
        assert len(values) >= 2, text
        assert ";" not in rest and re.fullmatch(r"(-?\d*\.?\d*,?)*", rest), text  # a last step cut short, no more


def test_the_mixture_has_one_to_three_variables_mostly_two(two_decimals):
    counts = np.bincount([_steps(text, 2)[0].shape[1] for text in two_decimals], minlength=5) / len(two_decimals)
    assert counts[0] == counts[4] == 0
    assert 0.02 < counts[1] < 0.15 and counts[2] > 0.7 and 0.02 < counts[3] < 0.15


def test_the_mixture_has_several_precisions_mostly_two_decimals(mixed):
    decimals = [max(len(re.match(r"\d*", part)[0]) for part in text.split(".")[1:-1] or [""]) for text in mixed]
    shares = np.bincount(decimals, minlength=5) / len(mixed)
    assert shares[2] > 0.75 and min(shares[0], shares[1], shares[3]) > 0.005 and shares[4:].sum() == 0


def test_a_few_texts_are_shorter(two_decimals):
    lengths = np.array([len(text) for text in two_decimals])  # at most 120
    assert 0.005 < np.mean(lengths < 120) < 0.1 and lengths.min() < 100


def test_gaussian_processes_have_the_variance_of_their_kernels():
    """In the middle, where the straight line is nought, every other kernel is 1: sums 2 or 1, products 1 or 0."""
    draws = [gaussian_process(np.random.default_rng(seed), 1, 8)[0] for seed in range(400)]  # (8, 3) each
    middle = np.array([np.mean(x[4] ** 2) for x in draws])  # one process each, three draws
    assert middle.mean() == pytest.approx(1.1, rel=0.15)  # added: 3/5 · 2 + 2/5 · 1; multiplied: 3/5 · 1
    assert np.mean(middle < 1e-3) == pytest.approx(0.2, abs=0.07)  # products with the line: half of two fifths


def test_negative_values_occur_and_are_the_exception(mixed):
    share = np.mean(["-" in text for text in mixed])
    assert 0.05 < share < 0.5


def test_half_the_texts_begin_where_their_series_does(two_decimals):
    """The others begin anywhere, even inside a number, as the contexts of protocol P5 do."""
    whole = np.mean([bool(re.match(r"-?(0|[1-9]\d*)\.\d\d[,;]", text)) for text in two_decimals])
    assert 0.5 < whole < 0.9  # one in five or so of those that begin anywhere begins a number, too


def test_families_have_equal_shares(monkeypatch):
    calls = []
    monkeypatch.setattr(
        "m2helpers.pretraining.synthetic.draw_series",
        lambda rng, n, steps, name: calls.append((name, n)) or [np.ones((steps, 1))] * n,
    )
    assert len(draw_texts([0], 80, 50)) == 80
    assert {name for name, _ in calls} == NAMES and {n for _, n in calls} == {5}  # 80 of 17 families
    calls.clear()
    assert len(draw_texts([0], 7, 50, family="schnakenberg")) == 7 and calls == [("schnakenberg", 7)]
