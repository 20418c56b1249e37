"""Where things are: data, bases, runs, ledgers and pages."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CHECKPOINTS = ROOT / "checkpoint"
DATA_FILE = ROOT / "data" / "lotka_volterra_data.h5"
BASELINE_CACHE = ROOT / "data" / "baselines"
BENCHMARKS = ROOT / "docs" / "benchmarks.json"


def checkpoint_folder(name: str) -> Path:
    """Where the runs and the ledger of a base are kept: ``checkpoint/<base>/``, for ``checkpoint/<base>/base`` too."""
    path = Path(name).resolve()
    inside = path.name == "base" and path.parent.parent == CHECKPOINTS
    return path.parent if inside else CHECKPOINTS / Path(os.path.abspath(name)).name
