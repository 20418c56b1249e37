"""The goals of the benchmarks: what is measured is read from the record, and what has not been run says so."""

import json

from m2helpers.report import goals
from m2helpers.report.goals import GOALS, goals_table


def test_a_goal_is_measured_or_said_not_to_have_been_run(tmp_path, monkeypatch):
    times = {"peft + Trainer": 9.0, "peft + Trainer, torch.compile": 6.0, "full vocabulary": 5.0, "numeric head": 2.0}
    rows = [dict(work="4 × 512", side=side, seconds=s, peak_gb=s) for side, s in times.items()]
    path = tmp_path / "b.json"
    path.write_text(json.dumps({"rivals": dict(machine="two threads", date="2026-12-01", rows=rows)}))
    monkeypatch.setattr(goals, "SHIPPED_BENCHMARKS", path)
    _, _, first, *others = goals_table().splitlines()
    assert first.endswith("| 2.5 | 3.00 (peft + Trainer, torch.compile) | 0.33 | two threads; 2026-12-01 |")
    assert len(others) == len(GOALS) - 1 and all("| **not run** | – | none: `bench rivals" in line for line in others)
    assert "1.3, at 0.5 of the memory" in others[0]
