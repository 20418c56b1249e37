"""How much sooner a small plan is done by two workers of this machine than by one process: run by hand.

python -m tests.campaigns.cluster     (takes minutes; writes docs/cluster.json, which the page on clusters shows)
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from dataclasses import replace
from datetime import date
from functools import partial
from pathlib import Path

import pandas as pd
import torch

from m2helpers.data import load_dataset
from m2helpers.experiments.cluster import on_ray
from m2helpers.experiments.planning import PLANS
from m2helpers.experiments.runner import in_turn, run_plan
from m2helpers.experiments.timing import machine
from m2helpers.files import read_json, write_json
from m2helpers.paths import CLUSTER_TIMES

STEPS, SEEDS, ROUNDS = 40, 4, 2
PLAN = replace(
    PLANS["embedded"],
    final=replace(PLANS["embedded"].final, max_steps=STEPS, save_steps=STEPS // 2, max_length=512),
    seeds=SEEDS,
    measured=(),
)
ABOUT = (
    f"The final run of the embedded base's plan, cut to {STEPS} steps of 4 × 512 tokens, with {SEEDS} seeds, its loss measured and nothing "
    f"forecast; one thread a run. Each way {ROUNDS} times in turn; the shorter time of each."
)


def records(folder: Path) -> dict[str, object]:
    """What every file of a plan holds, times left out."""
    found: dict[str, object] = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = str(path.relative_to(folder))
        if path.name == "history.csv":
            found[name] = pd.read_csv(path, dtype=str).drop(columns="tokens_per_second").to_csv()
        elif path.name == "metrics.json":
            found[name] = [row | {"seconds": 0} for row in read_json(path)]
        else:
            found[name] = path.read_bytes()
    return found


def main() -> int:
    """Time both ways, and write the record; fail if the records of the runs differ."""
    torch.set_num_threads(1)
    load, dataset, made = os.getloadavg()[0], load_dataset(), []
    ways = {"one process": in_turn, "two workers": partial(on_ray, cpus=1)}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for way, executor in [*ways.items()] * ROUNDS:
        with tempfile.TemporaryDirectory() as name:
            os.environ["M2_LEDGER"] = str(Path(name) / "ledger.sqlite")
            started = time.monotonic()
            run_plan(PLAN, "embedded", dataset, Path(name) / "out", stages=["final"], executor=executor)
            seconds[way].append(round(time.monotonic() - started, 1))
            made.append(records(Path(name) / "out"))
    rows = [{"way": way, "seconds": taken} for way, taken in seconds.items()]
    alike = all(of_one == made[0] for of_one in made)
    write_json(CLUSTER_TIMES, {
        "about": ABOUT, "machine": machine(), "date": str(date.today()), "load": round(load, 1), "rows": rows,
        "alike": alike,
    })  # fmt: skip
    print(seconds)
    return 0 if alike else 1


if __name__ == "__main__":
    sys.exit(main())
