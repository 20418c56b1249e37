"""`calibrate` on validation series, then `evaluate --samples` with what it found: a model that knows nothing, kept to the grammar."""

import json

import pytest

from m2helpers import paths
from m2helpers.__main__ import main


@pytest.mark.slow
def test_what_calibrate_finds_evaluate_applies(tiny_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(paths, "BASELINE_CACHE", tmp_path / "cache")
    data, found, scores = (str(tmp_path / name) for name in ("small.h5", "calibration.json", "scores.json"))
    assert main(["simulate", "--out", data, "--systems", "20", "--seed", "1"]) == 0
    common = ["--model", str(tiny_folder), "--data", data, "--limit", "1", "--samples", "3"]
    assert main(["calibrate", *common]) == 1  # nothing it writes parses
    assert "no sampled forecast of some step parses" in capsys.readouterr().err
    assert main(["calibrate", *common, "--constrained", "--json", found]) == 0
    record = json.loads((tmp_path / "calibration.json").read_text())
    assert record["split"] == "validation" and record["samples"] == 3 and record["windows"] == [4, 2, 1]
    assert all(len(factors) == 5 and min(factors) > 0 for factors in record["spread"].values())

    monkeypatch.setattr("m2helpers.cli.measuring._calibration_file", lambda model, run: tmp_path / "calibration.json")
    assert main(["evaluate", *common, "--context", "512", "--constrained", "--json", scores]) == 0
    (row,) = json.loads((tmp_path / "scores.json").read_text())
    assert row["calibrated"]["spread"] == record["spread"]["512"] and "spread" in row["distribution"]
    assert row["n"] == row["distribution"]["n_valid"] == 2 and row["machine"] and row["against_stored"]["mae"] > 0
    assert "| 512 | calibrated |" in capsys.readouterr().out
