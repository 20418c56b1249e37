"""The report's pages and tables come from records, and from nowhere else."""

import json

import pytest

from m2helpers import report
from m2helpers.evaluation import Result
from m2helpers.files import UserError


def make_result(mae: float | None, context: int = 128, **changes) -> Result:
    """A result of two windows, both with the same error."""
    values = dict(
        protocol="P5", split="test", context=context, precision=2, seed=0, scale=1.0, mse=mae and mae**2, rmse=mae, mae=mae,
        mae_per_variable=mae and [mae, mae / 2], per_step_mae=mae and [mae] * 5, n=2, n_valid=2 if mae else 0,
        ci_mae=mae and [mae * 0.9, mae * 1.1], flops=10, seconds=1.0, model="m", run=None, data_sha256="d",
        window_mae=[mae, mae], series=[0, 1],
    )  # fmt: skip
    return Result(**values | changes)


def test_pages_agree_with_the_records():
    contents = report.blocks()
    marked = [page for page in report.pages() if "<!-- begin: " in page.read_text(encoding="utf-8")]
    assert {page.name for page in marked} >= {"README.md", "index.md"}
    for page in marked:
        text = page.read_text(encoding="utf-8")
        assert report.fill_blocks(text, contents) == text, f"{page}: out of date, run 'make readme'"


def test_a_changed_record_changes_the_page(tmp_path, monkeypatch):
    for stage, mae in {"base": 0.5, "initial": 0.1234}.items():
        (tmp_path / stage).mkdir()
        rows = [vars(make_result(mae, context)) for context in (128, 512, 768)]
        (tmp_path / stage / "metrics.json").write_text(json.dumps(rows))
    monkeypatch.setattr(report, "checkpoint_folder", lambda base: tmp_path)
    before = report.fill_blocks("<!-- begin: results -->\n<!-- end: results -->", {"results": report.headline_table()})
    rows[0]["mae"] = 0.4321
    (tmp_path / "initial" / "metrics.json").write_text(json.dumps(rows))
    after = report.fill_blocks(before, {"results": report.headline_table()})
    assert "0.1234" in before and "0.4321" not in before
    assert "0.4321" in after


def test_fill_blocks_refuses_what_it_cannot_fill():
    with pytest.raises(UserError, match="'strange' has no content"):
        report.fill_blocks("<!-- begin: strange -->x<!-- end: strange -->", {"results": ""})
    with pytest.raises(UserError, match="no end"):
        report.fill_blocks("<!-- begin: results -->x", {"results": ""})


def test_results_table_shows_invalid_forecasts_and_changes():
    table = report.results_table(
        {"untrained": [make_result(0.2)], "initial": [make_result(0.1)], "bad": [make_result(None)]}
    )
    assert list(table["valid"]) == ["2 of 2", "2 of 2", "0 of 2"]
    assert table["change against untrained"][1].startswith("-50 %")
    assert table["MAE"][2] == ""  # nothing is made up for a model with no valid forecast
