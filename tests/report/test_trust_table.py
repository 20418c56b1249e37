"""The page on trust says what the record says."""

import json

from m2helpers.report import trust


def test_counts_are_those_of_the_record(tmp_path, monkeypatch):
    monkeypatch.setattr(trust, "ROOT", tmp_path)
    assert trust.trust_table() == "No campaign has been recorded."
    record = {
        "fuzz": {
            "date": "2026-01-02",
            "seed": 3,
            "ended": {"csv": {"done": 1000, "refused": 20}, "command": {"usage": 4}},
        },
        "faults": {
            "date": "d",
            "works": {
                "train": {
                    "writes": 22,
                    "every": 2,
                    "moments": 7,
                    "met": {"ENOSPC: refused": 3, "SIGHUP: killed": 2, "SIGHUP: done": 1},
                }
            },
        },
        "numbers": {"date": "d", "samples": 10000, "settings": 400, "negative": 9, "invalid": 0, "configurations": 200},
        "platforms": {
            "date": "d",
            "resolves": {"3.11 linux": True, "3.12 linux": True, "3.11 mac": False, "3.12 mac": False},
        },
        "image": {"date": "d", "bytes": 2_100_000_000, "stop_seconds": 1.5, "with": "buildah 1"},
    }
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "trust.json").write_text(json.dumps(record))
    table = trust.trust_table()
    for line in (
        "**1,024 inputs** (seed 3), 2026-01-02:", "| csv | 1,020 | 1,000 | 20 | 0 |", "| command | 4 | 0 | 0 | 4 |", "| train | 22 | 2 | 7 | 6 | 1 | 3 | 2 |",
        "**10,000 sampled forecasts** at 400 settings, 9 with negative values: 0 invalid.", "Python 3.11 to 3.12 on linux; it does not on mac.",
        "**The image** has 2.10 GB and stops 1.5 s after SIGTERM (buildah 1).",
    ):  # fmt: skip
        assert line in table
