"""The report's pages and tables come from records, and from nowhere else."""

import json
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from m2helpers import report
from m2helpers.evaluation.scores import Errors, Result, to_json
from m2helpers.files import UserError
from m2helpers.forecasting import Forecasts, Outlook
from m2helpers.report import headline, pages, plots, tables, terms
from m2helpers.series import table_of


def make_result(mae: float | None, context: int = 128, **changes) -> Result:
    """A result of two windows, both with the same error."""
    values = dict(
        protocol="P5", split="test", context=context, precision=2, seed=0, scale=1.0, mse=mae and mae**2, rmse=mae, mae=mae,
        mae_per_variable=mae and [mae, mae / 2], per_step_mae=mae and [mae] * 5, n=2, n_valid=2 if mae else 0,
        ci_mae=mae and [mae * 0.9, mae * 1.1], flops=10, seconds=1.0, model="m", run=None, data_sha256="d",
        window_mae=[mae, mae], series=[0, 1],
    )  # fmt: skip
    return Result(**values | changes)


def make_errors(mae: float) -> Errors:
    """Errors of the same two windows."""
    return Errors(mae**2, mae, mae, [mae, mae], [mae] * 5, [mae, mae], [mae, mae])


def _records_in(monkeypatch, folder):
    for module in (headline, pages, tables):
        monkeypatch.setattr(module, "checkpoint_folder", lambda base: folder)


@pytest.mark.slow
def test_pages_agree_with_the_records():
    contents = report.blocks()
    marked = [page for page in report.all_pages() if "<!-- begin: " in page.read_text(encoding="utf-8")]
    assert {page.name for page in marked} >= {"README.md", "index.md"}
    for page in marked:
        text = page.read_text(encoding="utf-8")
        assert report.fill_blocks(text, contents) == text, f"{page}: out of date, run 'make readme'"


@pytest.mark.slow
def test_a_changed_record_changes_the_page(tmp_path, monkeypatch):
    for stage, mae in {"base": 0.5, "initial": 0.1234}.items():
        (tmp_path / stage).mkdir()
        rows = [vars(make_result(mae, context)) for context in (128, 512, 768)]
        (tmp_path / stage / "metrics.json").write_text(json.dumps(rows))
    _records_in(monkeypatch, tmp_path)
    before = report.fill_blocks("<!-- begin: results -->\n<!-- end: results -->", {"results": report.headline_table()})
    rows[0]["mae"] = 0.4321
    (tmp_path / "initial" / "metrics.json").write_text(json.dumps(rows))
    after = report.fill_blocks(before, {"results": report.headline_table()})
    assert "0.1234" in before and "0.4321" not in before
    assert "0.4321" in after and "training seeds: 1;" in after
    others = [vars(make_result(0.9, context, split="validation")) for context in (128, 512, 768)]
    (tmp_path / "initial" / "metrics.json").write_text(json.dumps(others + rows))
    assert "0.4321" in report.headline_table() and "0.9000" not in report.headline_table()  # the test split's alone
    rows = [vars(make_result(None, context)) for context in (128, 512, 768)]
    for stage in ("final", "final-seed1"):
        (tmp_path / stage).mkdir()
    for stage in ("initial", "final", "final-seed1"):
        (tmp_path / stage / "metrics.json").write_text(json.dumps(rows))
    table = report.headline_table()
    (tmp_path / "initial" / "metrics.json").write_text(json.dumps([vars(make_result(0.25, 512))]))
    assert "| – | **0.2500** (0.2250–0.2750) | – |" in report.headline_table()  # each under its own context
    assert (
        "| no valid forecast | no valid forecast |" in table
        and "training seeds: initial 1, final 2, of which the first" in table
    )


def test_the_spending_follows_the_ledger(tmp_path, monkeypatch):
    _records_in(monkeypatch, tmp_path)
    assert "No ledger" in report.spending_table()
    ledger = tmp_path / "ledger.csv"
    ledger.write_text("stage,kind,flops\ninitial,train,3e13\ninitial,validate,1e13\nfinal,train,6e13\n")
    assert report.spending_table().splitlines()[-1] == "| **all** | 9e13 | 1e13 | 1e14 | 0.1000% |"
    ledger.write_text("stage,kind,flops\ninitial,train,3e14\n")
    assert report.spending_table().splitlines()[-1] == "| **all** | 3e14 | 3e14 | 0.3000% |"


def test_the_pre_training_follows_its_record(tmp_path, monkeypatch):
    _records_in(monkeypatch, tmp_path)
    assert "No pre-training" in report.pretraining_summary()
    (tmp_path / "base").mkdir()
    sittings = [
        dict(machine=machine, tokens=n * 10**6, seconds=60 * n) for machine, n in (("one", 2), ("two", 9), ("one", 3))
    ]
    record = sittings[-1] | {"before": sittings[:-1], "total": {"tokens": 14e6, "flops": 1.5e15}}
    (tmp_path / "base" / "pretraining.json").write_text(json.dumps(record))
    assert report.pretraining_summary() == (
        "Pre-training took 14 million tokens in 3 sittings (5 million in 5 minutes on one; 9 million in 9 minutes on two) "
        "and 1.5e15 FLOPs, which are not charged to the 1e17."
    )


def test_the_benchmarks_follow_their_record(tmp_path, monkeypatch):
    monkeypatch.setattr(pages, "SHIPPED_BENCHMARKS", tmp_path / "benchmarks.json")
    assert report.benchmarks_table() == "No benchmark has been recorded."
    row = {"side": "theirs", "seconds": 12.345678, "ratio": 1.0, "times": [12.3], "peak_gb": 8.0, "peak_ratio": 1.0}
    entry = {
        "about": "A step.",
        "machine": "a machine",
        "date": "2026-01-02",
        "rows": [row],
        "profile": {"ours": {"a": 0.75, "b": 0.25}},
    }
    (tmp_path / "benchmarks.json").write_text(json.dumps({"train": entry}))
    lines = report.benchmarks_table().splitlines()
    assert lines[0] == "**A step.** a machine; 2026-01-02."
    assert lines[2:] == [
        "|  | seconds, median | times as fast | peak memory (GB) | of the first row's |",
        "|---|---|---|---|---|",
        "| theirs | 12.35 | 1 | 8 | 1 |",
        "",
        "Where the time of *ours* goes: a 75%, b 25%.",
    ]


def test_fill_blocks_refuses_what_it_cannot_fill():
    with pytest.raises(UserError, match="'strange' has no content"):
        report.fill_blocks("<!-- begin: strange -->x<!-- end: strange -->", {"results": ""})
    with pytest.raises(UserError, match="no end"):
        report.fill_blocks("<!-- begin: results -->x", {"results": ""})


def test_results_table_shows_invalid_forecasts_and_changes():
    table = report.results_table(
        {"untrained": [make_result(0.2)], "initial": [make_result(0.1)], "bad": [make_result(None)]}
    )
    assert list(table["model"]) == ["before fine-tuning", "initial", "bad"]
    assert list(table["valid"]) == ["2 of 2", "2 of 2", "0 of 2"]
    assert table["change against before fine-tuning"][1].startswith("-50 %")
    assert table["MAE"][2] == ""  # nothing is made up for a model with no valid forecast
    apart = {
        "untrained": [make_result(0.2, window_mae=[None, 0.2])],
        "initial": [make_result(0.1, window_mae=[0.1, None])],
    }
    assert not report.results_table(apart).get("change against before fine-tuning", [""])[0]  # nothing to compare
    few = make_result(0.1, window_mae=[0.1], series=[0])
    with pytest.raises(UserError, match="measured on different windows"):
        report.results_table({"untrained": [make_result(0.2)], "initial": [few]})


def test_side_by_side_sets_published_figures_beneath_and_makes_nothing_up():
    table = report.side_by_side({"ours": [make_result(0.2)], "bad": [make_result(None)]}, ["final"])
    assert list(table["S = 128"].iloc[:, 0]) == ["0.2000 (0.1800–0.2200)", "no valid forecast", "0.0726"]
    assert list(table["S = 128"]["MSE"]) == ["0.04", "", "0.0263"]
    assert "not run here" in table.index[2]


@pytest.mark.slow
def test_published_figures_stand_apart_with_their_source(tmp_path, monkeypatch):
    _records_in(monkeypatch, tmp_path)
    (tmp_path / "initial").mkdir()
    (tmp_path / "initial" / "metrics.json").write_text(json.dumps(to_json([make_result(0.1234)])))
    ours, theirs = report.headline_table().split("Measured by others")
    assert "0.1234" in ours and "0.0726" not in ours and "Qwen" not in ours
    assert "0.0726" in theirs and report.tables.PUBLISHED_LINK in theirs and "not run here" in theirs
    assert "untrained" not in ours + theirs


def test_what_pre_training_cost_follows_its_record(tmp_path, monkeypatch):
    _records_in(monkeypatch, tmp_path)
    assert report.pretraining_cost() == ""
    (tmp_path / "base").mkdir()
    sittings = [dict(machine=m, flops=f) for m, f in (("one, bfloat16", 1e15), ("two", 5e14), ("one, bfloat16", 5e14))]
    record = sittings[-1] | {"before": sittings[:-1], "total": {"flops": 2e15}}
    (tmp_path / "base" / "pretraining.json").write_text(json.dumps(record))
    said = report.pretraining_cost()
    assert "2e15 FLOPs, not charged to the 1e17, 75% of them on one one" in said and "validation series" in said


def test_a_second_measurement_completes_a_record_and_changes_none_of_its_figures(tmp_path, monkeypatch):
    _records_in(monkeypatch, tmp_path)
    (tmp_path / "initial").mkdir()
    stored = Errors(0.04, 0.2, 0.2, [0.2, 0.2], [0.2], [0.1, 0.3], [0.2, 0.2])
    again = [make_result(0.11, 128, against_stored=stored, machine="m"), make_result(0.11, 512, precision=3)]
    first = [make_result(0.1), make_result(0.1, 512)]
    for name, rows in (("metrics", first), ("scores", again)):
        (tmp_path / "initial" / f"{name}.json").write_text(json.dumps(to_json(rows)))
    at_128, at_512 = report.stage_results("embedded")["initial"]
    assert (at_128.mae, at_128.against_stored, at_128.machine) == (0.1, stored, "m")
    assert at_512 == first[1]  # of another precision


def test_the_law_is_compared_by_what_the_records_say(tmp_path, monkeypatch):
    _records_in(monkeypatch, tmp_path)
    law = [make_result(0.1, c, window_mae=[0.1, 0.1], as_computed=make_errors(0.5)) for c in (128, 512)]
    law = [replace(row, against_stored=make_errors(0.3)) for row in law]
    for module in (tables, terms, headline):
        monkeypatch.setattr(
            module, "baseline_results", lambda: dict.fromkeys(("ODE fit", "vector autoregression"), law)
        )
    assert report.beside_the_law() == ""
    (tmp_path / "extended").mkdir()
    rows = [make_result(0.3, 128, window_mae=[0.5, 0.1]), make_result(0.04, 512, window_mae=[0.06, 0.02])]
    (tmp_path / "extended" / "metrics.json").write_text(json.dumps(to_json(rows)))
    said = report.beside_the_law()
    assert "is 3.0 / 0.4 times its error (S = 128 / 512)" in said
    assert "worse than it in 0% / 50% / 50%; 100% / 0% / 0%" in said and said in report.headline_table()
    assert "| embedded base, extended | ODE fit | 0% / 50% / 50% | 100% / 0% / 0% | – |" in report.duels_table()
    table = report.terms_table()
    assert "| baseline: ODE fit | 0.1000 | 0.1000 | 0.3000 | 0.3000 |" in table
    assert "ODE fit 0.5000 / 0.5000" in table and "| *rounding alone* | 0.0000 |" in table


def test_live_agreement_counts_windows_and_refuses_other_data():
    recorded = [make_result(0.2, window_mae=[0.2, None, 0.4], series=[0, 1, 2])]
    live = [make_result(0.2, n=2, window_mae=[0.2005, None])]
    (row,) = report.live_agreement(live, recorded).to_dict("records")
    assert (row["windows"], row["agree"]) == (2, 2)
    live = [make_result(0.2, n=2, window_mae=[0.3, 0.2])]
    assert report.live_agreement(live, recorded)["agree"][0] == 0
    with pytest.raises(UserError, match="other data than was loaded"):
        report.live_agreement([make_result(0.2, data_sha256="other")], recorded)


def test_extremes_leave_invalid_windows_out():
    result = make_result(0.2, window_mae=[0.3, None, 0.1, 0.2])
    assert report.extremes(result) == {"best": 2, "median": 3, "worst": 0}


@pytest.mark.parametrize(
    ("change", "words"), [((-5, -9, -1), "better"), ((5, 1, 9), "worse"), ((-5, -9, 1), "no clear difference")]
)
def test_verdict_needs_an_interval_clear_of_zero(change, words):
    assert report.verdict(change) == words


def test_recorded_base_falls_back_to_embedded(tmp_path, monkeypatch):
    monkeypatch.setenv("M2_MODEL", "someone/model")
    _records_in(monkeypatch, tmp_path)
    assert report.recorded_base("initial") == "embedded"
    (tmp_path / "initial").mkdir()
    (tmp_path / "initial" / "metrics.json").write_text("[]")
    assert report.recorded_base("initial") == "someone/model"


@pytest.mark.parametrize("held_back", [False, True])
def test_a_picture_of_ones_own_forecast_shows_bands_and_truth(held_back):
    index = pd.date_range("2021-01-01", periods=30)
    table = table_of(pd.DataFrame({"hare": np.arange(30.0), "lynx": np.arange(30.0)}, index=index.rename("day")))
    (history,) = table.histories
    paths = np.arange(11.0)[:, None, None] * np.ones((11, 4, 2))
    truth = np.full((4, 2), 30.0) if held_back else None
    outlook = Outlook(history, history.rhythm.ahead(4), paths, truth)
    figure = plots.plot_own_forecast(Forecasts(table, [outlook, replace(outlook, problem="too short")]))
    first, second = figure.axes
    assert (first.get_ylabel(), second.get_ylabel(), second.get_xlabel()) == ("hare", "lynx", "day")
    labels = first.get_legend_handles_labels()[1]
    assert labels == ["history", "80 % band", "50 % band", "forecast (median)"] + ["truth, held back"] * held_back
    middle = next(line for line in first.lines if line.get_label() == "forecast (median)")
    assert middle.get_ydata() == pytest.approx([5] * 4)
    band = first.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == pytest.approx((1, 9))
    plt.close(figure)


@pytest.mark.parametrize(
    ("value", "digits", "written"),
    [(2.5e14, 2, "2.5e14"), (1e17, 4, "1e17"), (6.87e-5, 3, "6.87e-5"), (-3e-12, 2, "-3e-12"), (1e100, 1, "1e100"), (0.0310, 4, "0.031"), (0.0, 4, "0")],
)  # fmt: skip
def test_figures_are_written_as_people_write_them(value, digits, written):
    assert report.findings.figure(value, digits) == written and float(written) == value


def test_what_several_stages_have_in_common_is_said_once():
    before = {"untrained": [make_result(0.2, s) for s in (128, 512)]}
    later = {stage: [make_result(0.1, s) for s in (128, 512)] for stage in ("initial", "final", "extended")}
    said = headline._verdicts(before | later)
    assert said.endswith("*initial*, *final* and *extended*: better at every S.")
    mixed = headline._verdicts(before | later | {"final": [make_result(0.1), make_result(0.3, 512)]})
    assert mixed.count("better at every S") == 1 and "*final*: S = 128, better; S = 512, worse." in mixed
