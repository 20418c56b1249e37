"""Protocols, scores, intervals and comparisons."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats

from m2helpers.evaluation import measure, protocols
from m2helpers.evaluation.measure import evaluate, evaluate_baselines, rounding_cost
from m2helpers.evaluation.protocols import Case, make_cases
from m2helpers.evaluation.scores import Result, bootstrap, duel, from_json, paired_change, score, to_json
from m2helpers.files import UserError, read_json, write_json
from m2helpers.forecasting import Generated
from m2helpers.paths import CHECKPOINTS
from m2helpers.text import Codec, fit_scale

CODEC = Codec(1.0)
# What DESIGN.md promises of `evaluate --json`, and the two columns that comparisons need.
KEYS = {"protocol", "split", "context", "precision", "seed", "scale", "mse", "rmse", "mae", "mae_per_variable"}
KEYS |= {"per_step_mae", "n", "n_valid", "ci_mae", "flops", "seconds", "model", "run", "data_sha256"}
KEYS |= {"window_mae", "series", "base_sha256", "constrained"}


def _series(length, seed=0):
    """One hundred steps of two variables whose text has `length` characters, the longer numbers first."""
    values = np.random.default_rng(seed).uniform(0, 9.9, (200,))
    values[: length - 1000] += 10  # one more digit each
    return values.reshape(100, 2)


@pytest.fixture
def oracle(monkeypatch):
    """A model that knows the rest of every text; `oracle.write` may spoil what it writes."""
    oracle = SimpleNamespace(texts=[], name="oracle", sha256="b", write=lambda index, text: text)

    def generate(base, codec, contexts, n_steps, n_variables, **options):
        out = []
        for context in contexts:
            (rest,) = (t.split(context, 1)[1] for t in oracle.texts if context in t)
            oracle.calls += 1
            text = "".join(f"{step};" for step in rest.split(";")[:n_steps])
            out.append(Generated(oracle.write(oracle.calls - 1, text), 10))
        return out

    oracle.calls = 0
    monkeypatch.setattr(measure, "generate", generate)
    return oracle


def _dataset(trajectories, sha256="d" * 64):
    return SimpleNamespace(part=lambda name: trajectories, sha256=sha256, time=np.arange(float(trajectories.shape[1])))


# ---------------------------------------------------------------- windows


@pytest.mark.parametrize("length", [1000, 1040, 1083])
def test_p5_has_four_two_and_one_windows_a_series(length):
    series = _series(length)
    text = CODEC.encode(series)
    assert len(text) == length
    for context, starts in ((128, [0, 256, 512, 768]), (512, [0, 256]), (768, [0])):
        cases = make_cases(series[None], CODEC, "P5", context)
        assert [case.start for case in cases] == starts, context
        for case in cases:
            assert case.context == text[case.start : case.start + context] and case.skip == 1
            rest = text[case.start + context :]
            expected = CODEC.decode(rest.partition(";")[2], 2).values[:5]
            np.testing.assert_array_equal(case.truth, expected)
            assert case.truth.shape == (5, 2)


def test_p5_counts_windows_in_the_longest_texts():
    """From 1,084 tokens on, sixty follow one window more: it counts where six separators are among them."""
    late = _series(1000)
    late[-22:] += 100  # two more digits each
    late[0] += 10
    assert len(CODEC.encode(late)) == 1090
    assert [len(make_cases(late[None], CODEC, "P5", context)) for context in (128, 512, 768)] == [4, 2, 1]
    early = _series(1091)
    assert [len(make_cases(early[None], CODEC, "P5", context)) for context in (128, 512, 768)] == [4, 3, 2]


def test_p5_truth_is_what_follows_the_first_separator():
    series = np.arange(200).reshape(100, 2) / 100
    (case,) = make_cases(series[None, :20], CODEC, "P5", 104)  # what follows begins ",0.21;0.22,0.23;"
    assert case.context.endswith(";0.20")
    np.testing.assert_allclose(case.truth, series[11:16])


def test_p5_asks_for_sixty_tokens_and_six_separators():
    """The rule at its edge: 59 tokens are too few, and so are 60 with five separators among them."""
    short = np.full((1, 20, 2), 1.0)  # ten tokens a step
    assert len(make_cases(short, CODEC, "P5", 140)) == 1  # 60 tokens follow
    with pytest.raises(UserError, match="series of 20 steps are too short for context 141"):
        make_cases(short, CODEC, "P5", 141)
    wide = np.full((1, 20, 2), 100.0)  # fourteen tokens a step
    assert len(make_cases(wide, CODEC, "P5", 280 - 71)) == 1
    with pytest.raises(UserError, match="too short"):
        make_cases(wide, CODEC, "P5", 280 - 70)  # five steps to the end, and no separator before them


def test_a_context_holds_a_whole_step():
    series = np.full((1, 20, 2), 1.0)  # ten tokens a step
    with pytest.raises(UserError, match="a window of 9 tokens holds no whole step; use a longer context"):
        make_cases(series, CODEC, "P5", 9)
    assert make_cases(series, CODEC, "P5", 19)


def test_every_split_is_measured_on_its_own_series(tiny_base, small_data, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        measure, "generate", lambda b, c, texts, *_, **__: [seen.append(t) or Generated("", 1) for t in texts]
    )

    def last_value(cases, *_, **__):
        return {"last": [np.repeat(known[-1:], n, axis=0) for known, n in cases]}

    monkeypatch.setattr(measure, "run_baselines", last_value)
    monkeypatch.setattr(measure, "BASELINES", {"last": None})
    codec, errors = Codec(fit_scale(small_data.part("train"))), []
    for split in ("train", "validation", "test"):
        seen.clear()
        evaluate(tiny_base(), codec, small_data, "P5", split=split, contexts=[64])
        series = [codec.encode(values) for values in small_data.part(split)]
        assert len(seen) == len(series) and all(map(str.startswith, series, seen))
        (row,) = evaluate_baselines(small_data, codec, "P5", split=split, contexts=[64], cache=tmp_path)
        errors.append(row.mae)
    assert len(set(errors)) == 3


def test_every_context_is_looked_at_before_anything_is_forecast(tiny_base, small_data, monkeypatch):
    monkeypatch.setattr("m2helpers.evaluation.measure.generate", None)
    with pytest.raises(UserError, match="too short for context 768; use longer ones, or P5 with a shorter context"):
        evaluate(tiny_base(), Codec(1.0), small_data, "P5", contexts=[64, 768])


def test_p5_rule_follows_the_precision():
    """In general the rest holds six of the shortest timesteps: 6 × 2 × 2 characters at precision 0."""
    series = np.full((1, 20, 2), 1.0)  # "1,1;"
    assert len(make_cases(series, Codec(1.0, 0), "P5", 80 - 24)) == 1
    with pytest.raises(UserError):
        make_cases(series, Codec(1.0, 0), "P5", 80 - 23)


@pytest.mark.parametrize("protocol, known, ahead", [("L50", 50, 50), ("L20", 80, 20)])
def test_long_protocols_cut_between_steps(protocol, known, ahead):
    trajectories = np.stack([_series(1000, seed) for seed in range(3)])
    cases = make_cases(trajectories, CODEC, protocol)
    assert [case.series for case in cases] == [0, 1, 2]
    for case, series in zip(cases, trajectories, strict=True):
        assert case.context == CODEC.encode(series[:known]) and case.skip == 0
        np.testing.assert_array_equal(case.truth, series[known:])
        assert len(case.truth) == ahead
    with pytest.raises(UserError, match=f"protocol {protocol}: series of 99 steps are too short"):
        make_cases(trajectories[:, :99], CODEC, protocol)


def test_an_unknown_protocol_is_refused(tmp_path):
    with pytest.raises(UserError, match="protocol P5: give a context, in tokens"):
        make_cases(np.ones((1, 100, 2)), CODEC, "P5")
    with pytest.raises(UserError, match="protocol 'P6': choose from P5, L50, L20"):
        evaluate_baselines(_dataset(np.ones((12, 100, 2))), CODEC, "P6", cache=tmp_path)
    with pytest.raises(UserError, match="protocol 'P6': choose from P5, L50, L20"):
        make_cases(np.ones((1, 100, 2)), CODEC, "P6")


@pytest.mark.parametrize("context", [128, 512, 768])
def test_a_window_carries_its_future_as_stored(context):
    """Wherever the window is cut, the stored steps are those that the text's are the rounding of."""
    series = np.random.default_rng(1).uniform(0, 15, (100, 2))
    codec = Codec(1.2175)
    for case in make_cases(series[None], codec, "P5", context):
        assert case.stored.shape == case.truth.shape == (5, 2)
        np.testing.assert_allclose(codec.rounded(case.stored), case.truth, atol=1e-12)
        assert 0 < np.abs(case.stored - case.truth).max() <= 0.005 / codec.scale + 1e-12
    (long,) = make_cases(series[None], codec, "L50")
    assert long.stored is long.truth


# ---------------------------------------------------------------- equal terms


def test_models_and_baselines_are_rounded_alike(oracle, tmp_path, monkeypatch):
    """The same forecast, as a model writes it and as a baseline computes it, has one error on equal terms, window by window."""
    rng = np.random.default_rng(5)
    trajectories = rng.uniform(0.5, 9.4, (3, 100, 2))
    codec = Codec(1.2175)
    ahead = trajectories + rng.normal(0, 0.02, trajectories.shape)  # what both forecast
    oracle.texts = [codec.encode(series) for series in trajectories]
    cases = {context: make_cases(trajectories, codec, "P5", context) for context in (128, 512, 768)}
    todo = iter([case for context in cases for case in cases[context]])

    def of(case):  # the forecast of a window, from the step that its context ends in
        first = oracle.texts[case.series].count(";", 0, case.start + len(case.context))
        return ahead[case.series, first : first + 6]

    oracle.write = lambda index, text: codec.encode(of(next(todo)))
    model = evaluate(oracle, codec, _dataset(trajectories), "P5")
    monkeypatch.setattr(measure, "BASELINES", {"same": None})
    monkeypatch.setattr(
        measure, "run_baselines", lambda known, dt, cache, key, progress: {"same": [of(c) for c in cases[int(key.split("-")[2])]]}
    )  # fmt: skip
    baseline = evaluate_baselines(_dataset(trajectories), codec, "P5", cache=tmp_path)
    for ours, theirs in zip(model, baseline, strict=True):
        assert ours.window_mae == theirs.window_mae and ours.mae == pytest.approx(theirs.mae, abs=1e-12)
        assert duel(ours, theirs) == (0, ours.n, 0)
        assert ours.as_computed is None and theirs.as_computed.mae != pytest.approx(theirs.mae, rel=1e-6)
        exact = np.mean([np.abs(of(c)[1:] - c.stored).mean() for c in cases[ours.context]])
        assert theirs.against_stored.mae == pytest.approx(exact)
        text = np.mean([np.abs(codec.rounded(of(c)[1:]) - c.stored).mean() for c in cases[ours.context]])
        assert ours.against_stored.mae == pytest.approx(text)


def test_rounding_alone_costs_a_quarter_of_the_last_decimal():
    trajectories = np.random.default_rng(2).uniform(0, 15, (20, 100, 2))
    for row in rounding_cost(_dataset(trajectories), Codec(1.2175)):
        assert row.mae == 0 and row.against_stored.mae == pytest.approx(0.0025 / 1.2175, rel=0.05)


def test_a_duel_counts_windows():
    ours, theirs = _result([0.1, 0.2, None, 0.3, 0.123456]), _result([0.2, 0.1, 0.1, 0.4, 0.123457])
    assert duel(ours, theirs) == (2, 1, 1) and duel(theirs, ours) == (1, 1, 2)
    with pytest.raises(UserError, match="measured on different windows"):
        duel(ours, replace(theirs, context=512))


# ---------------------------------------------------------------- evaluate


@pytest.mark.parametrize("protocol", ["P5", "L50", "L20"])
def test_a_forecast_that_is_the_truth_scores_zero(oracle, protocol):
    trajectories = np.stack([_series(1050, seed) for seed in range(4)])
    codec = Codec(1.25)
    oracle.texts = [codec.encode(series) for series in trajectories]
    results = evaluate(oracle, codec, _dataset(trajectories), protocol, batch_size=3)
    assert [r.context for r in results] == {"P5": [128, 512, 768], "L50": [50], "L20": [80]}[protocol]
    for result in results:
        assert result.n == result.n_valid == len(result.window_mae) > 0
        limit = 0 if protocol == "P5" else 0.5 * 10**-2 / codec.scale + 1e-9  # P5 reads the truth from text as well
        assert 0 <= result.mae <= limit and max(result.per_step_mae) <= limit
        assert result.flops == 10 * result.n and result.model == "oracle"


def test_forecasts_that_do_not_parse_are_counted_and_not_filled_in(oracle):
    """Every other forecast is spoilt; the others are off by 0.10 in the text, 0.05 in the series' units."""
    trajectories = np.full((8, 100, 2), 1.0)
    trajectories[:, :, 0] += np.arange(8)[:, None] / 10
    codec = Codec(2.0)
    oracle.texts = [codec.encode(series) for series in trajectories]
    spoil = [lambda t: t[:-3], lambda t: t.replace(".", ".1", 1), lambda t: "", lambda t: "x" + t]

    def write(index, text):
        if index % 2:
            return spoil[index // 2 % 4](text)
        return codec.encode(codec.decode(text, 2).values + 0.05)

    oracle.write = write
    (result,) = evaluate(oracle, codec, _dataset(trajectories), "L50")
    assert (result.n, result.n_valid) == (8, 4)
    assert [m is None for m in result.window_mae] == [False, True] * 4
    assert result.mae == pytest.approx(0.05) and result.mse == pytest.approx(0.0025)


def test_a_limit_takes_the_first_series(oracle):
    trajectories = np.stack([_series(1000, seed) for seed in range(4)])
    oracle.texts = [CODEC.encode(series) for series in trajectories]
    (result,) = evaluate(oracle, CODEC, _dataset(trajectories), "P5", contexts=[512], limit=2)
    assert result.series == [0, 0, 1, 1]


def test_a_real_model_is_evaluated(tiny_base):
    """A model that knows nothing: nothing of it parses, and the result says so."""
    trajectories = np.stack([_series(1000, seed) for seed in range(2)])[:, :30]
    (result,) = evaluate(tiny_base(), CODEC, _dataset(trajectories), "P5", contexts=[200])
    assert result.n == 2 and result.n_valid == 0 and result.flops > 0
    assert result.mae is result.mse is result.ci_mae is result.per_step_mae is None


# ---------------------------------------------------------------- score


@pytest.mark.slow
def test_a_constrained_forecast_is_always_valid(tiny_base):
    """Even by a model with random weights."""
    base, trajectories = tiny_base(), np.stack([_series(1000, seed) for seed in range(2)])
    (free,) = evaluate(base, CODEC, _dataset(trajectories), "L20")
    (kept,) = evaluate(base, CODEC, _dataset(trajectories), "L20", constrained=True)
    assert (free.n_valid, free.constrained) == (0, False)
    assert (kept.n_valid, kept.constrained, kept.base_sha256) == (2, True, base.sha256)


def test_the_score_worked_by_hand():
    truth = np.array([[1.0, 2.0], [3.0, 4.0]])
    cases = [Case(series, 0, "", truth, 0) for series in (0, 0, 1, 2)]
    forecasts = [
        truth + np.array([[0.1, -0.3], [0.0, 0.2]]),
        truth[:1],  # one step of two: invalid
        np.concatenate(
            [truth + np.array([[0.5, 0.0], [0.0, -0.1]]), [[99, 99]]]
        ),  # what comes after the truth is not compared
        np.empty((0, 2)),  # nothing parsed
    ]
    got = score(cases, forecasts)
    assert got.n == 4 and got.n_valid == 2 and got.series == [0, 0, 1, 2]
    assert got.window_mae == [pytest.approx(0.15), None, pytest.approx(0.15), None]
    assert got.mae == pytest.approx((0.1 + 0.3 + 0.2 + 0.5 + 0.1) / 8)
    assert got.mse == pytest.approx((0.01 + 0.09 + 0.04 + 0.25 + 0.01) / 8)
    assert got.rmse == pytest.approx((0.4 / 8) ** 0.5)
    assert got.mae_per_variable == pytest.approx([(0.1 + 0.5) / 4, (0.3 + 0.2 + 0.1) / 4])
    assert got.per_step_mae == pytest.approx([(0.1 + 0.3 + 0.5) / 4, (0.2 + 0.1) / 4])
    assert got.ci_mae == pytest.approx([0.15, 0.15])


def test_nothing_valid_has_no_error():
    got = score([Case(0, 0, "", np.ones((2, 2)), 0)], [np.ones((1, 2))])
    assert got.n_valid == 0 and got.window_mae == [None]
    assert all(
        getattr(got, name) is None for name in ("mse", "rmse", "mae", "mae_per_variable", "per_step_mae", "ci_mae")
    )


def test_every_committed_record_is_written_as_it_was_read():
    """The fields of a `Result`, and their order, are the format of ``metrics.json``."""
    paths = [path for path in sorted(CHECKPOINTS.glob("**/metrics.json")) if "instruct" not in path.parts]
    assert len(paths) > 5
    for path in paths:
        text = path.read_text(encoding="utf-8")
        assert json.dumps(to_json(from_json(json.loads(text))), indent=1) + "\n" == text, path


# ---------------------------------------------------------------- intervals


def test_the_interval_contains_the_mean_and_is_wider_for_correlated_windows():
    rng = np.random.default_rng(0)
    values = (rng.normal(1, 0.3, (40, 1)) + rng.normal(0, 0.05, (40, 4))).ravel()  # four windows a series, much alike
    low, high = bootstrap(list(values), list(np.repeat(np.arange(40), 4)))
    naive = bootstrap(list(values), list(range(160)))
    assert low < values.mean() < high and naive[0] < values.mean() < naive[1]
    assert high - low > 1.6 * (naive[1] - naive[0])  # in theory twice as wide
    spread = values.reshape(40, 4).mean(axis=1).std(ddof=1) / 40**0.5
    assert (high - low) / 2 == pytest.approx(1.96 * spread, rel=0.1)


def test_the_interval_leaves_out_invalid_windows():
    values, series = [1.0, None, 3.0, 2.0, None], [0, 0, 1, 2, 3]
    assert bootstrap(values, series) == bootstrap([1.0, 3.0, 2.0], [0, 1, 2])
    assert bootstrap([2.0, 2.0], [0, 1]) == (2.0, 2.0)


# ---------------------------------------------------------------- comparisons


def _result(window_mae, **changes):
    about = dict(protocol="P5", split="test", context=128, precision=2, seed=0, scale=1.0, flops=1, seconds=1.0)
    about |= dict(model="a", run=None, data_sha256="d")
    cases = [Case(series, 0, "", np.zeros((1, 1)), 0) for series in range(len(window_mae))]
    forecasts = [np.empty((0, 1)) if e is None else np.full((1, 1), e) for e in window_mae]
    return Result(**(about | vars(score(cases, forecasts)) | changes))


def test_a_change_is_counted_on_common_valid_windows():
    ours = _result([1.0, None, 2.0, 50.0])
    theirs = _result([2.0, 7.0, 4.0, None])
    change, low, high = paired_change(ours, theirs)
    assert change == pytest.approx(100 * (1.5 - 3) / 3)
    assert low == pytest.approx(change) and high == pytest.approx(change)  # both windows got better by half
    change, low, high = paired_change(_result([1.0, 4.0, 3.0, 2.0, 2.5]), _result([2.0, 3.0, 6.0, 4.0, 5.0]))
    assert low < change < high and change == pytest.approx(100 * (12.5 - 20) / 20)


def test_the_interval_of_a_change_is_that_of_a_ratio():
    rng = np.random.default_rng(3)
    theirs = rng.lognormal(0, 1, 60).round(4)
    ours = (theirs * rng.uniform(0.3, 0.9, 60)).round(4)

    def ratio(a, b, axis):
        return a.mean(axis) / b.mean(axis)

    known = scipy.stats.bootstrap((ours, theirs), ratio, paired=True, method="percentile", n_resamples=20_000, rng=1)
    expected = [100 * (x - 1) for x in known.confidence_interval]
    _, *interval = paired_change(_result(list(ours)), _result(list(theirs)))
    np.testing.assert_allclose(interval, expected, atol=0.06 * (expected[1] - expected[0]))


def test_small_units_keep_their_digits():
    ours, theirs = _result([1.25e-9, 3e-9]), _result([2.5e-9, 6e-9])
    assert ours.window_mae == [1.25e-9, 3e-9] and paired_change(ours, theirs)[0] == pytest.approx(-50)


@pytest.mark.parametrize(
    "change",
    [dict(data_sha256="e"), dict(series=[0, 0, 1]), dict(context=512), dict(protocol="L50"), dict(split="validation")],
)
def test_results_on_other_windows_are_not_compared(change):
    ours = _result([1.0, 2.0, 3.0])
    with pytest.raises(UserError, match="measured on different windows: evaluate both on the same data, split"):
        paired_change(ours, replace(ours, **change))


def test_nothing_in_common_is_not_compared():
    with pytest.raises(UserError, match="no window where both gave a valid forecast"):
        paired_change(_result([1.0, None]), _result([None, 2.0]))


# ---------------------------------------------------------------- records


def test_records_have_the_keys_of_the_design(tmp_path):
    results = [_result([1.0, None, 3.0]), _result([None, None])]
    rows = to_json(results)
    assert all(set(row) == KEYS for row in rows)
    write_json(tmp_path / "metrics.json", rows)
    assert from_json(read_json(tmp_path / "metrics.json")) == results
    assert json.loads((tmp_path / "metrics.json").read_text())[0]["ci_mae"] == results[0].ci_mae
    more = replace(results[0], against_stored=score([Case(0, 0, "", np.ones((1, 1)), 0)], [np.ones((1, 1))]).errors)
    write_json(tmp_path / "scores.json", to_json([replace(more, machine="m")]))
    assert from_json(read_json(tmp_path / "scores.json")) == [replace(more, machine="m")]


# ---------------------------------------------------------------- baselines


def test_baselines_see_the_whole_steps_of_a_context():
    series = np.arange(200).reshape(100, 2) / 50
    cases = make_cases(series[None], CODEC, "P5", 128)
    assert cases[1].context.startswith(".02;")  # begins inside a number
    for case in cases:
        known = protocols.numeric_context(CODEC, case, 2)
        first = 0 if case.start == 0 else -(-case.start // 10)  # whole steps only, ten characters each
        last = (case.start + 128) // 10
        np.testing.assert_allclose(known, series[first:last], atol=1e-9)
        np.testing.assert_allclose(case.truth, series[last + 1 : last + 6], atol=1e-9)


def test_a_cut_number_is_dropped_even_when_it_reads_as_one():
    """A context that begins "16,1.27;" could be read as a step, but it is the end of "1.16,1.27;"."""
    case = Case(0, 2, "16.00,1.27;0.90,0.95;0.83", np.zeros((5, 2)), 1)
    np.testing.assert_allclose(protocols.numeric_context(CODEC, case, 2), [[0.90, 0.95]])
    whole = replace(case, start=0)
    np.testing.assert_allclose(protocols.numeric_context(CODEC, whole, 2), [[16.0, 1.27], [0.90, 0.95]])


def test_baselines_are_measured_on_the_same_windows(tmp_path, monkeypatch):
    """The baseline that forecasts the step after the last whole one is right when it continues a line."""
    series = np.stack([np.arange(100) / 20, 5 - np.arange(100) / 25], axis=1)[None]

    def run(cases, dt, cache, key, progress):
        assert dt == 1.0 and cache == tmp_path
        line = [known[-1] + np.arange(1, steps + 1)[:, None] * (known[-1] - known[-2]) for known, steps in cases]
        return {"line": line, "last": [np.repeat(known[-1:], steps, axis=0) for known, steps in cases]}

    monkeypatch.setattr(measure, "run_baselines", run)
    monkeypatch.setattr(measure, "BASELINES", {"line": None, "last": None})
    for protocol in ("P5", "L20"):
        results = evaluate_baselines(_dataset(series), CODEC, protocol, cache=tmp_path)
        line, last = ([r for r in results if r.model == name] for name in ("line", "last"))
        assert [r.n for r in line] == ([4, 2, 1] if protocol == "P5" else [1])
        assert max(r.mae for r in line) < 1e-9 < 0.05 < min(r.mae for r in last)
