"""What the site says of sweeps, ablations and seeds comes from their records, and changes with them."""

import json

import pytest

from m2helpers.experiments.planning import plan_of
from m2helpers.report import findings

SETTINGS = dict(learning_rate=5e-3, lora_r=4, max_length=512, precision=2, seed=0, max_steps=200)


@pytest.fixture
def record(tmp_path, monkeypatch):
    """Writes the record of a run: its settings, its least validation loss, and its error at each context."""
    monkeypatch.setattr(findings, "checkpoint_folder", lambda base: tmp_path)

    def write(name, loss, error=None, flops=2, **settings):
        folder = tmp_path / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps({"settings": SETTINGS | settings}))
        (folder / "history.csv").write_text(f"step,val_loss,flops\n100,0.9,1\n200,{loss},{flops}\n")
        if error is not None:
            about = dict(protocol="P5", split="validation", mae=error)
            rows = [about | {"context": context} for context in (128, 512, 768)]
            (folder / "metrics.json").write_text(json.dumps(rows))

    return write


@pytest.fixture
def sweeps(record):
    losses = {(2.5e-3, 2): 0.7, (2.5e-3, 8): 0.6, (5e-3, 2): 0.65, (5e-3, 8): 0.5, (1e-2, 8): 0.55}
    for (rate, rank), loss in losses.items():
        record(f"sweep/lr{rate:g}-r{rank}-n512-p2-seed0", loss, learning_rate=rate, lora_r=rank)
    record("sweep/lr0.005-r0-n512-p2-seed0", 0.8, lora_r=0)
    for run, error in zip(plan_of("embedded").runs_of(["context"]), (0.3, 0.2, 0.1), strict=True):
        record(run.name, 0.66, error, max_length=run.settings.max_length)
    return losses


def test_without_records_nothing_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(findings, "checkpoint_folder", lambda base: tmp_path)
    assert findings.sweeps_table() == findings.advice() == "No sweep has been recorded for this base."
    assert findings.ablations_table() == "No ablation has been recorded for this base."
    assert findings.seeds_table().count("\n") == 1 and findings.grid_losses().empty


def test_seeds(tmp_path, monkeypatch):
    monkeypatch.setattr(findings, "checkpoint_folder", lambda base: tmp_path)
    monkeypatch.setattr(findings, "from_json", lambda rows: [type("Row", (), row) for row in rows])
    for name, mae, data in (("final", 0.1, "a"), ("final-seed1", 0.3, "a"), ("final-seed2", 0.9, "of another file")):
        (tmp_path / name).mkdir()
        about = dict(protocol="P5", split="test", data_sha256=data, base_sha256="b")
        rows = [about | dict(context=context, mae=mae, mse=mae / 10) for context in (128, 512, 768)]
        (tmp_path / name / "metrics.json").write_text(json.dumps(rows))
    assert findings.seeds_table().splitlines()[2:] == [
        "| final | MAE | 2 |" + " 0.2000 (0.1000–0.3000) |" * 3,
        "| final | MSE | 2 |" + " 0.02 (0.01–0.03) |" * 3,
    ]
    (tmp_path / "final-seed1" / "metrics.json").unlink()
    assert findings.seeds_table().splitlines()[2] == "| final | MAE | 1 |" + " 0.1000 |" * 3


def test_sweeps_stand_in_the_order_of_their_losses(sweeps):
    lines = findings.sweeps_table().splitlines()
    assert lines[2].startswith("| 0.005 | 8 | 512 | 2 | 200 | 0.5000 |") and "| 0.1000 |" in "".join(lines)
    assert [float(line.split("|")[6]) for line in lines[2:]] == sorted(float(line.split("|")[6]) for line in lines[2:])


def test_the_grid_leaves_other_sweeps_out(sweeps):
    grid = findings.grid_losses()
    assert list(grid.index) == [8, 4, 2, 0] and list(grid) == [2.5e-3, 5e-3, 1e-2]
    assert grid.loc[8, 5e-3] == 0.5 and grid.loc[4, 5e-3] == 0.66 and grid.loc[[2], 1e-2].isna().all()


def test_advice_is_tied_to_the_records(sweeps, record):
    said = findings.advice()
    assert (
        "spans 0.5000 to 0.6000 in validation loss (best: 0.005)" in said
        and "0.5000 to 0.6600 (best: 8, on the edge" in said
    )
    assert "Rank 0 ends at 0.8000, rank 8 at 0.5000" in said
    assert "768 tokens, 0.1000 for 2 FLOPs" in said and "worth its price" not in said and "Stop early" not in said
    record("sweep/lr0.01-r8-n512-p2-seed0", 0.4, learning_rate=1e-2, lora_r=8)
    assert "(best: 0.01, on the edge of the grid)" in findings.advice()


def test_ablations_are_compared_with_the_published_setting(sweeps, record):
    record("ablation/rescaled-series", 0.55)
    record("ablation/three-decimals", 0.1, precision=3)
    assert "worth its price" not in findings.advice()  # nothing to compare with
    record("ablation/published-setting", 0.6, 0.25)
    record("ablation/every-linear-layer", 0.5, flops=3)
    said = findings.advice()
    assert (
        "published setting (0.6000) after 200 steps: every linear layer -0.1000 (FLOPs ×1.50); rescaled series -0.0500"
        in said
    )
    assert "three decimals" not in said and "| three decimals | 0.005 | 200 | 0.1000 |" in findings.ablations_table()
    record("final", 0.45)
    assert (
        "Half of the final run's steps bring the validation loss to 0.9000, all of them to 0.4500" in findings.advice()
    )
