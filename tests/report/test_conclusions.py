"""What the conclusion says follows from the records, and says so where there is none."""

import numpy as np
import pandas as pd
import pytest

from m2helpers.flops.account import training_flops
from m2helpers.flops.architecture import QWEN_05B
from m2helpers.paths import EMBEDDED_BASE
from m2helpers.report import conclusions, tables
from m2helpers.report.findings import figure

RESULTS = tables.stage_results("embedded")


def _cells(table, label):
    (line,) = [line for line in table.splitlines() if line.startswith(f"| {label} |")]
    return [cell.strip() for cell in line.strip("| ").split("|")]


def test_error_left_and_price_are_those_of_the_records():
    history = pd.read_csv(EMBEDDED_BASE.parent / "final" / "history.csv")
    _, flops, share, *left = _cells(conclusions.bought(), "final")
    assert float(flops) == pytest.approx(history["flops"].iloc[-1], rel=0.01)
    assert float(share.strip("%")) / 100 == pytest.approx(history["flops"].iloc[-1] / 1e17, abs=1e-5)
    means = [[np.mean(row.window_mae) for row in RESULTS[stage]] for stage in ("untrained", "final")]
    assert left == [f"{after / before:.0%}" for before, after in zip(*means, strict=True)]


@pytest.mark.slow
def test_the_answer_names_every_context_and_its_errors():
    lines = conclusions.answer().splitlines()
    assert len(lines) == 3
    for line, before, after in zip(lines, RESULTS["untrained"], RESULTS["final"], strict=True):
        assert line.startswith(f"- **S = {before.context}.** {before.mae:.4f}") and f"{after.mae:.4f}" in line


def test_without_records_nothing_is_concluded(monkeypatch):
    monkeypatch.setattr(conclusions, "stage_results", lambda base: {})
    for passage in (conclusions.answer, conclusions.bought, conclusions.limits):
        assert passage() == conclusions._MISSING


def test_qwens_prices_are_those_of_the_account():
    price = training_flops(QWEN_05B, 4, 512, lora_r=4)
    assert _cells(conclusions.on_qwen(), "initial") == ["initial", figure(price, 3), "1,000", f"{1000 * price / 1e17:.1%}", f"{10**17 // price:,}"]  # fmt: skip
