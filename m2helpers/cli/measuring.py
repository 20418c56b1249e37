"""The command that measures a run, or a base."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

from tyro.conf import arg

from ..files import write_json
from ..paths import DATA_FILE
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
    constrained: Flag = False
    """Write only what the grammar allows; with the numeric head always so."""
    json: OptionalFile = None
    """Write the model's rows there, without the baselines'."""
    data: DataFile = DATA_FILE
    model: BaseOrRun = field(default_factory=default_model)
    run: RunOrBase = None
    adapter: Adapter = None

    def __call__(self) -> None:
        import pandas as pd

        from ..data import load_dataset
        from ..evaluation.measure import evaluate, evaluate_baselines
        from ..evaluation.protocols import P5_CONTEXTS, PROTOCOLS
        from ..evaluation.scores import Result, to_json
        from ..experiments.timing import machine
        from ..paths import BASELINE_CACHE
        from ..report.tables import results_table
        from ..text import Codec, fit_scale

        dataset = load_dataset(self.data)
        base, run, constrained = load_target(self.model, self.run, self.adapter, self.constrained)
        codec = run.codec if run else Codec(fit_scale(dataset.part("train")))
        contexts = [self.context] if self.context else P5_CONTEXTS
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
                run=str(trained) if trained else None,
                seed=run.settings.seed if run else None,
                constrained=constrained,
            )
        if self.json:  # before the baselines: a fit that is stopped loses no measurement
            write_json(self.json, to_json([replace(row, machine=machine()) for row in ours]))
        for protocol in protocols:
            for row in evaluate_baselines(
                dataset, codec, protocol, split=self.split, contexts=contexts, cache=BASELINE_CACHE
            ):
                rows.setdefault(row.model, []).append(row)
        numbers = ("display.float_format", "{:.4f}".format)
        with pd.option_context("display.width", 200, "display.max_columns", 20, *numbers):
            print(results_table(rows, reference=None).to_string(index=False))
