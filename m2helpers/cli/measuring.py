"""The commands that measure a run, or a base."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import arg

from ..files import UserError, check_writable, read_json, write_json
from ..paths import DATA_FILE, find_base, find_run
from ..settings import default_model
from .options import Adapter, BaseOrRun, DataFile, Flag, OptionalFile, RunOrBase, load_target


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Measure a run, or an untrained base, beside the baselines."""

    protocol: Literal["P5", "L50", "L20", "all"] = "P5"
    """Which windows are forecast."""
    split: Literal["train", "validation", "test"] = "test"
    """Part of the data."""
    context: Annotated[int | None, arg(metavar="S", help_behavior_hint="(default: 128, 512 and 768)")] = None
    """Tokens of context, P5 only."""
    samples: Annotated[int, arg(metavar="N", help_behavior_hint="(default: none)")] = 0
    """Draw N paths of each window as well and score them as distributions, as drawn and, after `calibrate`, stretched."""
    limit: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: all)")] = None
    """Only the first N series, for a quick look."""
    constrained: Flag = False
    """Write only what the grammar allows; with the numeric head always so."""
    json: OptionalFile = None
    """Write the model's rows there, without the baselines'."""
    data: DataFile = DATA_FILE
    model: BaseOrRun = field(default_factory=default_model)
    run: RunOrBase = None
    adapter: Adapter = None

    def __call__(self) -> None:
        if self.json:
            check_writable(self.json)
        import pandas as pd

        from ..data import load_dataset
        from ..evaluation.measure import evaluate, evaluate_baselines
        from ..evaluation.protocols import P5_CONTEXTS, PROTOCOLS
        from ..evaluation.scores import Result, to_json
        from ..experiments.timing import machine
        from ..paths import BASELINE_CACHE
        from ..report.distributions import distributions_table
        from ..report.tables import results_table
        from ..text import Codec, fit_scale

        dataset = load_dataset(self.data)
        base, run, constrained = load_target(self.model, self.run, self.adapter, self.constrained)
        codec = run.codec if run else Codec(fit_scale(dataset.part("train")))
        contexts = [self.context] if self.context else P5_CONTEXTS
        calibration = _calibration_file(self.model, self.run)
        spread = {
            int(context): factors
            for context, factors in (read_json(calibration)["spread"] if calibration.is_file() else {}).items()
        }
        protocols = PROTOCOLS if self.protocol == "all" else [self.protocol]
        ours: list[Result] = []
        trained = self.run or self.adapter
        rows = {str(trained or base.name): ours}
        for protocol in protocols:
            ours += evaluate(
                base,
                codec,
                dataset,
                protocol,
                split=self.split,
                contexts=contexts,
                limit=self.limit,
                run=str(trained) if trained else None,
                seed=run.settings.seed if run else None,
                constrained=constrained,
                samples=self.samples,
                spread=spread if protocol == "P5" and not self.adapter else None,
            )
        if self.json:  # before the baselines: a fit that is stopped loses no measurement
            write_json(self.json, to_json([replace(row, machine=machine()) for row in ours]))
        if table := distributions_table(ours):
            print(table, end="\n\n")
        for protocol in [] if self.limit else protocols:  # baselines are of the whole split
            for row in evaluate_baselines(
                dataset, codec, protocol, split=self.split, contexts=contexts, cache=BASELINE_CACHE
            ):
                rows.setdefault(row.model, []).append(row)
        numbers = ("display.float_format", "{:.4f}".format)
        with pd.option_context("display.width", 200, "display.max_columns", 20, *numbers):
            print(results_table(rows, reference=None).to_string(index=False))


@dataclass(frozen=True, kw_only=True)
class Calibrate:
    """Fit on validation series how wide a run's distributions ought to be, and write it beside the run."""

    samples: Annotated[int, arg(metavar="N")] = 20
    """Paths drawn of each window."""
    limit: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: all)")] = None
    """Only the first N series."""
    constrained: Flag = False
    """Write only what the grammar allows; with the numeric head always so."""
    json: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="(default: calibration.json of the run)")] = (
        None
    )
    """Write it there."""
    data: DataFile = DATA_FILE
    model: BaseOrRun = field(default_factory=default_model)
    run: RunOrBase = None

    def __call__(self) -> None:
        if self.samples < 2:
            raise UserError(f"--samples {self.samples}: a distribution needs at least 2")
        path = self.json or _calibration_file(self.model, self.run)
        check_writable(path)
        from ..data import load_dataset
        from ..evaluation.measure import calibrate
        from ..experiments.timing import machine
        from ..text import Codec, fit_scale

        dataset = load_dataset(self.data)
        base, run, constrained = load_target(self.model, self.run, None, self.constrained)
        codec = run.codec if run else Codec(fit_scale(dataset.part("train")))
        found = calibrate(base, codec, dataset, limit=self.limit, samples=self.samples, constrained=constrained)
        write_json(path, found | {"machine": machine()})
        for context, factors in found["spread"].items():
            print(f"S = {context}: stretched by {', '.join(f'{factor:.2f}' for factor in factors)}")
        print(f"{path}: written")


@dataclass(frozen=True, kw_only=True)
class Floor:
    """Compute the best possible forecasts of P5's windows, from the law of the data, and how far the shipped runs are from them."""

    split: Literal["train", "validation", "test"] = "test"
    """Part of the data."""
    context: Annotated[int | None, arg(metavar="S", help_behavior_hint="(default: 128, 512 and 768)")] = None
    """Tokens of context."""
    limit: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: all)")] = None
    """Only the first N windows of each length."""
    json: OptionalFile = None
    """Write the floor's rows there."""
    data: DataFile = DATA_FILE

    def __call__(self) -> None:
        if self.json:
            check_writable(self.json)
        from dataclasses import asdict

        from ..data import load_dataset
        from ..evaluation.floor import bayes_gap, floor, floor_row
        from ..evaluation.protocols import P5_CONTEXTS
        from ..evaluation.scores import from_json
        from ..paths import EMBEDDED_BASE
        from ..simulator import law_of
        from ..text import Codec, fit_scale

        dataset = load_dataset(self.data)
        law, codec = law_of(dataset), Codec(fit_scale(dataset.part("train")))
        rows = []
        for context in [self.context] if self.context else P5_CONTEXTS:
            found = floor(dataset, codec, law, context, split=self.split, limit=self.limit)
            rows.append(row := floor_row(dataset, codec, context, found, self.split))
            print(
                f"S = {context}: MAE {row.mae:.4f} ({row.ci_mae[0]:.4f}-{row.ci_mae[1]:.4f}), unrounded {row.mae_stored:.5f}, "
                f"CRPS {row.crps:.5f}, coverage {row.coverage_80:.1%}; {row.n_mixed} of {row.n} windows mixed"
            )
        if self.json:
            write_json(self.json, [asdict(row) for row in rows])
        records = {
            path.parent.name: from_json(read_json(path)) for path in sorted(EMBEDDED_BASE.parent.glob("*/metrics.json"))
        }
        records = {
            name: kept
            for name, results in records.items()
            if (kept := [r for r in results if (r.split, r.data_sha256) == (self.split, dataset.sha256)])
        }
        if len(gaps := bayes_gap(records, rows)):
            print(gaps.to_string(index=False, float_format="{:.4g}".format))


def _calibration_file(model: str, run: Path | None) -> Path:
    """Beside a run's, or a base's, weights."""
    folder = find_run(run) if run else find_base(model, weights=False)
    return (folder or Path()) / "calibration.json"
