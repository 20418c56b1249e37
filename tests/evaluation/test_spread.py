"""Scores of distributions against an independent library and by hand, and how far bands are stretched."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from m2helpers.evaluation import predictive
from m2helpers.evaluation.measure import calibrate, evaluate
from m2helpers.evaluation.protocols import Case, make_cases
from m2helpers.evaluation.scores import from_json, to_json
from m2helpers.evaluation.spread import LEVELS, score_distributions, spread_factors, stretched
from m2helpers.forecasting.distribution import Distribution
from m2helpers.text import Codec

CODEC = Codec(2.0, 1)  # cells of 0.05


def _windows(n, samples=40, spread=1.0, seed=0, steps=3):
    """Windows of `steps` × 2 values whose truth is drawn as the samples are, times `spread`."""
    rng = np.random.default_rng(seed)
    centre, scale = rng.uniform(2, 8, (n, steps, 2)), rng.uniform(0.2, 1, (n, steps, 2))
    truths = centre + spread * scale * rng.normal(size=centre.shape)
    known = CODEC.encode(np.arange(12.0).reshape(6, 2) ** 0.5)
    cases = [Case(i // 2, 0, known, CODEC.rounded(t), 0, t) for i, t in enumerate(truths)]
    draws = centre[:, None] + scale[:, None] * rng.normal(size=(n, samples, steps, 2))
    return cases, [Distribution.from_paths(CODEC.rounded(d), CODEC.resolution) for d in draws]


@pytest.mark.slow
def test_scores_agree_with_an_independent_library():
    import scoringrules  # takes seconds

    cases, distributions = _windows(12)
    scores = score_distributions(cases, distributions, CODEC, 40)
    truth = np.stack([case.unrounded for case in cases])
    dense = np.stack([d.quantile((np.arange(4000) + 0.5) / 4000) for d in distributions], axis=1)  # (4000, windows, …)
    crps = scoringrules.crps_ensemble(truth, dense, m_axis=0, estimator="qd")
    assert scores.crps == pytest.approx(crps.mean(), rel=2e-3)
    assert scores.crps_per_step == pytest.approx(crps.mean(axis=(0, 2)), rel=4e-3)
    quantiles = np.stack([d.quantile(LEVELS) for d in distributions], axis=1)
    lost = [scoringrules.quantile_score(truth, q, level) for q, level in zip(quantiles, LEVELS, strict=True)]
    assert scores.wql == pytest.approx(2 * np.mean([x.sum() for x in lost]) / np.abs(truth).sum())
    assert scores.ci_wql[0] < scores.wql < scores.ci_wql[1] and scores.ci_crps[0] < scores.crps < scores.ci_crps[1]


def test_scores_by_hand():
    """One window of one step: mass on 1.00 and 2.00, each a cell 0.05 wide; the truth is 1.01 and 3.00."""
    distribution = Distribution.from_paths(np.array([[[1.0, 1.0]], [[2.0, 2.0]]]), CODEC.resolution)
    case = Case(0, 0, "2.0,2.0;4.0,6.0;", CODEC.rounded([[1.01, 3.0]]), 0, np.array([[1.01, 3.0]]))
    scores = score_distributions([case], [distribution], CODEC, 2)
    assert scores.coverage_80 == scores.coverage_80_per_step[0] == 0.5
    assert scores.width_80 == pytest.approx(
        1 + 0.05 * 0.6
    )  # from a fifth of the lower cell to four fifths of the upper
    assert scores.mae_median == pytest.approx((0.49 + 1.5) / 2)
    assert scores.mase_median == pytest.approx((0.49 / 1 + 1.5 / 2) / 2)  # the context moves by 1 and by 2
    assert scores.pit == pytest.approx([0.1] * 5 + [0] * 4 + [0.5])  # 1.00's cell is the lower half; 3.0 is above all
    assert scores.n == scores.n_valid == 1 and scores.spread is None


@pytest.mark.slow
def test_the_pit_of_discrete_values_is_that_of_randomised_ones():
    cases, distributions = _windows(400, samples=15, spread=1.5)
    scores = score_distributions(cases, distributions, CODEC, 15)
    rng, half = np.random.default_rng(1), CODEC.resolution / 2
    spots = []
    for case, d in zip(cases, distributions, strict=True):
        low, high = d.cdf(case.truth - half), d.cdf(case.truth + half)
        spots.append(low + rng.uniform(size=(200, *low.shape)) * (high - low))
    by_chance = np.histogram(np.clip(spots, 0, 1 - 1e-12), bins=10, range=(0, 1))[0] / np.size(spots)
    np.testing.assert_allclose(scores.pit, by_chance, atol=2e-3)
    assert sum(scores.pit) == pytest.approx(1) and scores.pit[0] > 0.15 < scores.pit[-1]  # too narrow, as made


def test_stretching_keeps_medians_and_moves_quantiles_away_from_them():
    _, (distribution,) = _windows(1)
    wider = stretched(distribution, [1.0, 2.0, 0.5])
    q, wide = distribution.quantile(LEVELS), wider.quantile(LEVELS)
    np.testing.assert_allclose(wider.median, distribution.median, atol=1e-12)
    factor = np.array([1, 2, 0.5])[:, None]
    np.testing.assert_allclose(wide, distribution.median + factor * (q - distribution.median), atol=1e-12)
    levels = np.stack([wider.cdf(values) for values in wide])
    np.testing.assert_allclose(levels, np.broadcast_to(LEVELS[:, None, None], levels.shape), atol=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("spread", [0.5, 1.0, 2.0])
def test_factors_bring_the_bands_to_cover_what_is_asked(spread):
    cases, distributions = _windows(500, spread=spread)
    factors = spread_factors(cases, distributions)
    before = score_distributions(cases, distributions, CODEC, 40)
    after = score_distributions(cases, distributions, CODEC, 40, factors)
    assert after.coverage_80_per_step == pytest.approx([0.8] * 3, abs=2e-3) and after.spread == factors
    assert factors == pytest.approx([spread] * 3, rel=0.15)
    assert (abs(before.coverage_80 - 0.8) > 0.1) == (spread != 1.0)
    assert after.crps <= before.crps * 1.02
    fresh, theirs = _windows(500, spread=spread, seed=9)  # series that had no part in it
    assert score_distributions(fresh, theirs, CODEC, 40, factors).coverage_80 == pytest.approx(0.8, abs=0.03)


def test_a_window_without_every_step_is_counted_and_left_out():
    cases, (first, _) = _windows(2)
    lost = Distribution.from_paths(np.full((3, 3, 2), np.nan), CODEC.resolution)
    scores = score_distributions(cases, [first, lost], CODEC, 3)
    assert (scores.n, scores.n_valid) == (2, 1) and scores.window_crps[1] is None
    assert scores.crps == pytest.approx(score_distributions(cases[:1], [first], CODEC, 3).crps)
    assert score_distributions(cases, [lost, lost], CODEC, 3) is None


@pytest.fixture
def coin(monkeypatch):
    """Writes the truth, half the time one unit of the last decimal higher, and now and then nothing that parses."""
    trajectories = np.random.default_rng(3).uniform(1, 9, (4, 100, 2))
    codec, calls = Codec(1.0), []
    texts = [codec.encode(series) for series in trajectories]

    def generate(base, codec, contexts, n_steps, n_variables, **options):
        calls.append((len(contexts), options["temperature"], options["batch_size"]))
        out = []
        for i, context in enumerate(contexts):
            (rest,) = (t.split(context, 1)[1] for t in texts if context in t)
            first, _, later = rest.partition(";")
            values = codec.decode(later, 2).values[: n_steps - 1] + 0.01 * (i % 2)
            out.append(SimpleNamespace(text="x" if i % 20 == 19 else f"{first};{codec.encode(values)}", flops=3))
        return out

    monkeypatch.setattr(predictive, "generate", generate)
    return trajectories, codec, calls


def test_drawing_takes_the_compared_steps_of_every_path(coin):
    trajectories, codec, calls = coin
    cases = make_cases(trajectories, codec, "P5", 512)
    drawn = predictive.draw(None, codec, cases, 20)
    assert calls == [(200, 1.0, 200)] * (len(cases) // 10) + [(len(cases) % 10 * 20, 1.0, 200)] * (len(cases) % 10 > 0)
    assert drawn.flops == 60 * len(cases)
    for case, d in zip(cases, drawn.distributions, strict=True):
        np.testing.assert_allclose(d.probability(case.truth), 10 / 19)  # one of the 20 wrote nothing to read
        np.testing.assert_allclose(d.probability(case.truth + 0.01), 9 / 19)


def test_evaluate_and_calibrate_draw_and_record(coin, monkeypatch):
    trajectories, codec, _ = coin
    monkeypatch.setattr(
        "m2helpers.evaluation.measure.generate", lambda *a, **o: predictive.generate(*a, temperature=0, **o)
    )
    parts = []
    dataset = SimpleNamespace(part=lambda name: parts.append(name) or trajectories, sha256="d", time=np.arange(100.0))
    base = SimpleNamespace(name="b", sha256="b")
    monkeypatch.setattr("m2helpers.evaluation.measure.default_ledger", lambda base: None)
    found = calibrate(base, codec, dataset, samples=20)
    assert (
        parts == ["validation"]
        and found["split"] == "validation"
        and found["flops"] == sum(60 * n for n in found["windows"])
    )
    assert list(found["spread"]) == ["128", "512", "768"] and all(len(f) == 5 for f in found["spread"].values())
    row = evaluate(base, codec, dataset, "P5", contexts=[512], samples=20, spread={512: found["spread"]["512"]})[0]
    assert row.calibrated.spread == found["spread"]["512"] and row.calibrated.coverage_80 == pytest.approx(
        0.8, abs=0.02
    )
    assert row.distribution.spread is None and row.distribution.samples == 20 and row.flops == 63 * row.n
    assert from_json(to_json([row])) == [row]
    assert replace(row, distribution=None, calibrated=None).mae == row.mae
