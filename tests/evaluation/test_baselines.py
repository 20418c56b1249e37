"""Each baseline on a series whose continuation is known, and the cache that keeps their forecasts."""

import warnings

import numpy as np
import pytest
from scipy.integrate import solve_ivp

from m2helpers.evaluation import baselines
from m2helpers.evaluation.baselines import (
    BASELINES,
    integrate,
    last_value,
    ode_fit,
    run_baselines,
    vector_autoregression,
)
from m2helpers.files import UserError

DT = 200 / 99
R, K, A, H, E, D = PARAMETERS = (0.22, 9.0, 0.33, 0.10, 0.52, 0.21)


def reference(steps: int, parameters=PARAMETERS, start=(1.1, 0.9)) -> np.ndarray:
    """A predator-prey trajectory (steps, 2) by scipy, in populations: another solver, another form."""
    r, k, a, h, e, d = parameters

    def slope(_time, state):
        x, y = state
        return [r * x * (1 - x / k) - a * x * y / (1 + h * x), e * a * x * y / (1 + h * x) - d * y]

    times = DT * np.arange(steps)
    return solve_ivp(slope, (0, times[-1]), start, t_eval=times, method="DOP853", rtol=1e-10, atol=1e-12).y.T


def test_last_value_repeats_the_last_observation():
    context = np.array([[1.0, 2.0], [3.0, 4.0]], dtype=np.float32)
    forecast = last_value(context, 3, DT)
    assert forecast.dtype == np.float64
    assert forecast.tolist() == [[3.0, 4.0]] * 3


def test_vector_autoregression_continues_an_oscillation_that_is_linear_in_logs():
    time = np.arange(60)
    phase, decay = 0.31 * time, 0.99**time
    logs = np.stack([0.2 + 0.8 * decay * np.cos(phase), -0.5 + 0.6 * decay * np.sin(phase)], axis=1)
    forecast = vector_autoregression(np.exp(logs[:40]), 20, DT)
    np.testing.assert_allclose(forecast, np.exp(logs[40:]), rtol=1e-6)


def test_vector_autoregression_picks_a_longer_lag_where_one_is_needed():
    time = np.arange(100)
    logs = np.stack([np.cos(0.31 * time), np.sin(0.31 * time) + 0.5 * np.cos(0.9 * time)], axis=1)  # two frequencies
    forecast = vector_autoregression(np.exp(logs[:80]), 20, DT)
    np.testing.assert_allclose(forecast, np.exp(logs[80:]), rtol=1e-6)


def test_vector_autoregression_never_leaves_twice_the_range_of_the_context():
    context = np.exp(0.4 * np.arange(12.0)[:, None] * [1.0, -1.0] + np.random.default_rng(0).normal(0, 0.1, (12, 2)))
    forecast = vector_autoregression(context, 50, DT)
    assert np.all(forecast <= 2 * np.maximum(context, 0.004).max(axis=0) * (1 + 1e-9))
    assert np.all(forecast >= np.maximum(context, 0.004).min(axis=0) / 2 * (1 - 1e-9))
    np.testing.assert_allclose(forecast[-1, 0], 2 * context[:, 0].max())  # the growth did reach the limit


@pytest.mark.parametrize("parameters", [PARAMETERS, (0.30, 16.0, 0.21, 0.0, 0.60, 0.12)])
def test_integrate_agrees_with_scipy(parameters):
    columns = np.array([parameters, (0.15, 6.0, 0.4, 0.05, 0.4, 0.2)]).T  # (6, 2): the second system must not disturb
    path = integrate(columns, np.array([[1.1, 0.8], [0.9, 1.2]]), 100, DT)
    assert path.shape == (100, 2, 2)
    np.testing.assert_allclose(path[:, :, 0], reference(100, parameters), atol=1e-3)


def test_integrate_is_of_fourth_order():
    columns, start = np.array(PARAMETERS)[:, None], np.array([[1.1], [0.9]])

    def error(dt):
        truth = integrate(columns, start, 641, 20 / 640)[-1]
        return np.abs(integrate(columns, start, round(20 / dt) + 1, dt)[-1] - truth).max()

    assert 12 < error(0.625) / error(0.3125) < 20  # 2 ** 4


def test_ode_fit_continues_a_known_system_from_rounded_data():
    truth = reference(100)
    scale = 1.2
    context = np.round(truth[:50] * scale, 2) / scale
    errors = np.abs(ode_fit(context, 50, DT) - truth[50:])
    assert errors.mean() < 2e-3  # below the rounding itself
    assert errors.max() < 1e-2


def test_ode_fit_from_a_short_context_beats_the_other_baselines():
    truth = reference(18)
    context = np.round(truth[:12] * 1.2, 2) / 1.2
    errors = {name: np.abs(baseline(context, 6, DT) - truth[12:]).mean() for name, baseline in BASELINES.items()}
    assert errors["ODE fit"] < 0.02
    assert errors["ODE fit"] < min(errors["last value"], errors["vector autoregression"]) / 2


def test_ode_fit_tries_further_starts_only_where_the_first_misfits(monkeypatch):
    costs = []

    def recorded(residuals, start):
        fit = minimise(residuals, start)
        costs.append(fit.cost)
        return fit

    minimise = baselines._minimise
    monkeypatch.setattr(baselines, "_minimise", recorded)
    ode_fit(reference(20), 1, DT)
    assert len(costs) == 1 and costs[0] < 20
    costs.clear()
    ode_fit(np.random.default_rng(0).uniform(0.5, 3, (6, 2)), 1, DT)
    assert len(costs) == 3 and min(costs) > 6


def test_ode_fit_uses_dt():
    context = reference(40)
    half = ode_fit(context, 5, DT / 2)  # the same numbers twice as fast: other rates, the same continuation
    np.testing.assert_allclose(half, reference(45)[40:], atol=0.02)


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
def test_short_contexts_and_zeros_give_finite_forecasts_without_warnings(name, n):
    contexts = [reference(5)[:n], np.zeros((n, 2)), np.stack([np.linspace(1, 2, n), np.zeros(n)], axis=1)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for context in contexts:
            forecast = BASELINES[name](context, 4, DT)
            assert forecast.shape == (4, 2)
            assert np.all(np.isfinite(forecast))
            assert np.all(forecast >= 0)


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize(
    ("context", "steps", "message"),
    [
        (np.zeros((0, 2)), 3, r"context of shape \(0, 2\): give at least one step"),
        (np.ones(5), 3, r"context of shape \(5,\)"),
        (np.array([[1.0, np.nan]]), 3, "negative or not finite"),
        (np.array([[1.0, -0.5]]), 3, "negative or not finite"),
        (np.ones((5, 2)), 0, "cannot forecast 0 steps: ask for at least 1"),
    ],
)
def test_useless_requests_are_refused(name, context, steps, message):
    with pytest.raises(UserError, match=message):
        BASELINES[name](context, steps, DT)


def test_ode_fit_refuses_three_variables_the_others_take_them():
    context = np.random.default_rng(0).uniform(1, 2, (20, 3))
    with pytest.raises(UserError, match=r"needs two variables \(prey, predator\), not 3"):
        ode_fit(context, 2, DT)
    assert last_value(context, 2, DT).shape == vector_autoregression(context, 2, DT).shape == (2, 3)


@pytest.fixture
def cases():
    truth = reference(40)
    return [(truth[:8], 3), (truth[10:22], 5), (truth[20:30], 1)]


@pytest.fixture
def computed(monkeypatch):
    """Quick stand-ins, each with its own offset; the list records which were really computed."""
    calls = []

    def stand_in(name, offset):
        def call(context, steps, dt):
            calls.append(name)
            return last_value(context, steps, dt) + offset

        return call

    monkeypatch.setattr(baselines, "BASELINES", {name: stand_in(name, i) for i, name in enumerate(BASELINES)})
    return calls


def test_run_baselines_gives_what_the_functions_give(cases, tmp_path):
    forecasts = run_baselines(cases, DT, tmp_path, "key")
    assert list(forecasts) == [
        "last value", "seasonal naive", "context parroting", "vector autoregression", "ODE fit"
    ]  # fmt: skip
    for name, parts in forecasts.items():
        assert len(parts) == len(cases)
        for part, (context, steps) in zip(parts, cases, strict=True):
            np.testing.assert_array_equal(part, BASELINES[name](context, steps, DT))


def test_cache_hit_gives_the_same_and_computes_nothing(cases, tmp_path, computed):
    first = run_baselines(cases, DT, tmp_path, "key")
    assert len(computed) == 15
    again = run_baselines(cases, DT, tmp_path, "key")
    assert len(computed) == 15
    for name in BASELINES:
        for one, other in zip(first[name], again[name], strict=True):
            np.testing.assert_array_equal(one, other)
    assert [file.name for file in tmp_path.iterdir()] == ["key.npz"]


def test_stale_cache_is_computed_again_and_replaced(cases, tmp_path, computed):
    run_baselines(cases, DT, tmp_path, "key")
    changed = [(context * 1.01, steps) for context, steps in cases]
    assert run_baselines(changed, DT, tmp_path, "key")["last value"][0][0, 0] == changed[0][0][-1, 0]
    assert len(computed) == 30
    run_baselines(changed, DT, tmp_path, "key")
    assert len(computed) == 30  # the new one was kept
    run_baselines(changed, 2 * DT, tmp_path, "key")
    assert len(computed) == 45  # another dt
    run_baselines([(context, steps + 1) for context, steps in changed], 2 * DT, tmp_path, "key")
    assert len(computed) == 60  # other steps


def test_older_version_of_the_baselines_is_stale(cases, tmp_path, computed, monkeypatch):
    run_baselines(cases, DT, tmp_path, "key")
    monkeypatch.setattr(baselines, "_VERSION", baselines._VERSION + 1)
    run_baselines(cases, DT, tmp_path, "key")
    assert len(computed) == 30


def test_a_new_baseline_is_added_to_a_cache_and_the_others_stay(cases, tmp_path, computed, monkeypatch):
    first = run_baselines(cases, DT, tmp_path, "key")
    more = baselines.BASELINES | {"new": lambda context, steps, dt: last_value(context, steps, dt) + 9}
    monkeypatch.setattr(baselines, "BASELINES", more)
    again = run_baselines(cases, DT, tmp_path, "key")
    assert len(computed) == 15 and list(again) == [*first, "new"]
    np.testing.assert_array_equal(again["new"][1], first["last value"][1] + 9)
    monkeypatch.setitem(more, "new", None)  # not called again
    assert run_baselines(cases, DT, tmp_path, "key")["new"][1].shape == again["new"][1].shape


@pytest.mark.parametrize("keep", [0, 100, -40])
def test_damaged_cache_is_computed_again(cases, tmp_path, computed, keep):
    first = run_baselines(cases, DT, tmp_path, "key")
    file = tmp_path / "key.npz"
    file.write_bytes(file.read_bytes()[:keep])
    again = run_baselines(cases, DT, tmp_path, "key")
    assert len(computed) == 30
    np.testing.assert_array_equal(again["ODE fit"][1], first["ODE fit"][1])


def test_no_cases_and_keys_apart(cases, tmp_path, computed):
    assert run_baselines([], DT, tmp_path, "none") == {name: [] for name in BASELINES}
    run_baselines(cases, DT, tmp_path / "new" / "folder", "one")
    run_baselines(cases, DT, tmp_path / "new" / "folder", "two")
    assert sorted(file.name for file in (tmp_path / "new" / "folder").iterdir()) == ["one.npz", "two.npz"]


def test_progress_is_shown_only_when_asked_for(cases, tmp_path, capsys, computed):
    run_baselines(cases, DT, tmp_path, "silent")
    assert capsys.readouterr().err == ""
    run_baselines(cases, DT, tmp_path, "loud", progress=True)
    assert "baselines" in capsys.readouterr().err
