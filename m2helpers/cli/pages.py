"""Commands for the site: its benchmarks, and the blocks that are filled from records."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from ..files import check_writable
from ..paths import BENCHMARKS, CLASSICS, DATA_FILE, ROOT
from .options import DataFile


@dataclass(frozen=True, kw_only=True)
class Bench:
    """The benchmarks the site quotes, side by side with the alternative."""

    name: Positional[
        Literal[
            "train", "decode", "samples", "context", "train-embedded", "decode-embedded", "samples-embedded", "threads", "rivals", "rivals-decode", "classic"
        ]
    ]  # fmt: skip
    """Which benchmark."""
    json: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="(default: docs/benchmarks.json)")] = None
    """Record to put it into; that of `classic`, public series forecast beside ARIMA, ETS and simple methods, is one of its own."""
    device: Literal["cuda", "mps", "cpu"] | None = None
    """Where to run it; by default the first of these that there is. A GPU's record stands beside the CPU's."""
    data: DataFile = DATA_FILE

    def __call__(self) -> None:
        if self.device:
            os.environ["M2_DEVICE"] = self.device
        record = self.json or (CLASSICS if self.name == "classic" else BENCHMARKS)
        check_writable(record)
        import pandas as pd

        from ..data import load_dataset
        from ..experiments.bench import run_benchmark

        if self.name == "classic":
            self._classic(record)
            return
        entry = run_benchmark(self.name, load_dataset(self.data), record)
        print(entry["about"], entry["machine"], sep="\n")
        print(pd.DataFrame(entry["rows"]).drop(columns="times").to_string(index=False, float_format="{:.4g}".format))

    def _classic(self, path: Path) -> None:
        from ..experiments.classic import compare_classics, record_classics
        from ..models import load_base

        base = load_base()
        for row in record_classics(base, compare_classics(base), path):
            print(row["series"], *(f"{method} {error}" for method, error in row["errors"].items()), sep="; ")
        print(f"{path}: written")


@dataclass(frozen=True, kw_only=True)
class FillReadme:
    """Fill the marked blocks of README and pages from the records."""

    picture: bool = False
    """Draw the README's picture again too: forecasts of one test window, before fine-tuning and after."""

    def __call__(self) -> None:
        from ..report.pages import fill_pages

        if self.picture:
            from ..report.beforeafter import write_picture

            path = ROOT / "docs" / "_static" / "before_after.png"
            write_picture(path)
            print(f"{path.name}: drawn")
        for page in fill_pages():
            print(f"{page.name}: filled")
