"""Plans of experiments as data, and what they cost before anything runs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import pandas as pd

from ..data import Dataset
from ..evaluation.protocols import P5_CONTEXTS, PROTOCOLS, make_cases
from ..files import UserError
from ..flops.account import CAP
from ..flops.costs import Cost, batch_costs, generation_cost
from ..paths import is_embedded
from ..settings import EVERY_LINEAR, STAGES, TrainSettings
from ..text import Codec, fit_scale

if TYPE_CHECKING:
    from ..flops.architecture import Config

Change: TypeAlias = Mapping[str, Any]  # settings by name; `TrainSettings` checks their types
SWEEPS = ("grid", "context", "precision")
SWEEP_SERIES = 20  # validation series that every run of a sweep forecasts
ABLATION = "ablation"  # stands apart from the order of the stages: it is asked for by itself
FINAL_STAGES = ("final", "extended")
UNTRAINED = "untrained"  # no run, but the measurements of the base
STAGE_ORDER = (UNTRAINED, "initial", *SWEEPS, *FINAL_STAGES)
_IN_TABLES = {UNTRAINED: "before fine-tuning"}  # pre-trained it is


def stage_label(stage: str) -> str:
    """What tables and pictures call a stage."""
    return _IN_TABLES.get(stage, stage)


@dataclass(frozen=True)
class PlannedRun:
    """One fine-tuning run of a plan."""

    stage: str
    """One of `STAGE_ORDER`, but for ``untrained``, or `ABLATION`."""
    settings: TrainSettings
    changed: str = ""
    """What an ablation changes, in words."""

    @property
    def name(self) -> str:
        """Of its folder. Two places of a plan that ask for the same sweep run share one."""
        s = self.settings
        if self.stage == ABLATION:
            return f"{ABLATION}/{self.changed.replace(' ', '-')}"
        if self.stage not in SWEEPS:
            return f"{self.stage}-seed{s.seed}" if s.seed else self.stage
        return f"sweep/lr{s.learning_rate:g}-r{s.lora_r}-n{s.max_length}-p{s.precision}-seed{s.seed}"


@dataclass(frozen=True)
class Plan:
    """A plan of experiments: an initial run, three sweeps that start from its settings, and the long runs at the end."""

    initial: TrainSettings
    final: TrainSettings
    """Its learning rate follows the grid's best, by validation loss, where it adapts the layers that the grid adapts."""
    learning_rates: tuple[float, ...]
    """Of the grid, rising."""
    ranks: tuple[int, ...] = (2, 4, 8)
    """Of the grid, rising. A run of rank 0, the head bias alone, stands beside them as a control."""
    contexts: tuple[int, ...] = (128, 512, 768)
    precisions: tuple[int, ...] = (2, 3)
    long_rate: float = 1.0
    """Learning rate of a long run, the initial one too, as a share of a short run's: it stays at its peak for longer."""
    sweep_steps: int = 500
    extended: TrainSettings | None = None
    """A last run that goes beyond the published setting of the final one, where there is to be one."""
    amortised: TrainSettings | None = None
    """A run that is told the law of the data; it stands apart, and is trained by itself."""
    ablations: Mapping[str, Change] = field(default_factory=dict)
    """Changes to the final setting, in words and as settings, each tried in a run of its own."""
    seeds: int = 1
    """Of the long runs at the end, counted from the one that stands in their settings."""
    measured: tuple[str, ...] = ("untrained", "initial", *FINAL_STAGES)
    """Stages whose forecasts are made under every protocol."""

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise UserError(f"--seeds {self.seeds}: give 1 or more")

    @property
    def runs(self) -> tuple[PlannedRun, ...]:
        """Every run once, in order."""
        return self.runs_of(STAGE_ORDER)

    def runs_of(self, stages: Iterable[str]) -> tuple[PlannedRun, ...]:
        """The runs of some stages, each once, in order."""
        rate = self.initial.learning_rate / self.long_rate
        short = replace(self.initial, max_steps=self.sweep_steps, learning_rate=rate)
        grid = [replace(short, learning_rate=rate, lora_r=rank) for rate in self.learning_rates for rank in self.ranks]
        grid.append(replace(short, lora_r=0))
        runs = [PlannedRun("initial", self.initial)]
        runs += [PlannedRun("grid", settings) for settings in grid]
        runs += [PlannedRun("context", replace(short, max_length=n)) for n in self.contexts]
        runs += [PlannedRun("precision", replace(short, precision=p)) for p in self.precisions]
        for stage, settings in zip(FINAL_STAGES, (self.final, self.extended), strict=True):
            if settings is not None:
                more = range(settings.seed, settings.seed + self.seeds)
                runs += [PlannedRun(stage, replace(settings, seed=seed)) for seed in more]
        runs += [PlannedRun(ABLATION, replace(self.final, **change), words) for words, change in self.ablations.items()]
        once: dict[str, PlannedRun] = {}
        for run in runs:
            if run.stage in stages:
                once.setdefault(run.name, run)
        return tuple(once.values())

    def tuned(self, best: TrainSettings) -> Plan:
        """The plan with the learning rate that follows from the grid's best in the long runs that adapt the grid's layers."""

        def tuned(settings: TrainSettings) -> TrainSettings:
            if settings.target_modules != best.target_modules:
                return settings
            return replace(settings, learning_rate=self.long_rate * best.learning_rate)

        return replace(self, final=tuned(self.final), extended=self.extended and tuned(self.extended))

    def widened(self, best: TrainSettings) -> Plan:
        """The plan with one more value where the best setting lies on the edge of the grid; itself where it does not."""
        return replace(
            self,
            learning_rates=tuple(rate for rate in _widen(self.learning_rates, best.learning_rate) if rate < 1),
            ranks=tuple(int(rank) for rank in _widen(self.ranks, best.lora_r) if rank >= 1),
        )


def _widen(values: tuple[float, ...], best: float) -> tuple[float, ...]:
    """Extend a range past the edge that `best` is on, by the ratio of the last two values there."""
    if len(values) > 1 and best == values[-1]:
        return (*values, float(f"{best * best / values[-2]:.6g}"))
    if len(values) > 1 and best == values[0]:
        return (float(f"{best * best / values[1]:.6g}"), *values)
    return values


AS_PUBLISHED = "published setting"  # the ablation that changes nothing else: what the others are compared with
_BRIEF_RATE = 2.5e-3  # between the rates of the grid, 80 steps, and of the final run, 1,800
_BRIEF: Change = dict(max_steps=300, learning_rate=_BRIEF_RATE)
_EVERY_LAYER: Change = dict(target_modules=EVERY_LINEAR, learning_rate=2e-3)
_RANK_16: Change = dict(lora_r=16, lora_alpha=32)
ABLATIONS: dict[str, Change] = {
    words: {**_BRIEF, **change}
    for words, change in {
        AS_PUBLISHED: {},
        "every linear layer": _EVERY_LAYER,
        "every linear layer rank 16": {**_EVERY_LAYER, **_RANK_16},
        "every linear layer rank 16 faster": {**_EVERY_LAYER, **_RANK_16, "learning_rate": 4e-3},
        "rescaled series": dict(rescale=STAGES["extended"].rescale),
        "windows anywhere": dict(random_start=True),
        "no dropout": dict(lora_dropout=0.0),
        "averaged weights": dict(average=0.98),
        "twice the learning rate": dict(learning_rate=2 * _BRIEF_RATE),
        "three decimals": dict(precision=3),
    }.items()
}
_QWEN = TrainSettings(lora_r=4, learning_rate=1e-4, max_length=512, max_steps=1000)
PLANS = {
    "embedded": Plan(
        STAGES["initial"],
        STAGES["final"],
        extended=STAGES["extended"],
        learning_rates=(2.5e-3, 5e-3, 1e-2),
        long_rate=0.25,  # at half of the best of a grid and more, three long runs lost their way within 300 steps
        sweep_steps=80,
        ablations=ABLATIONS,
        amortised=replace(STAGES["extended"], max_steps=2000, rescale=0.0),  # no series comes twice
    ),
    "qwen2.5-0.5b": Plan(  # as published
        _QWEN, replace(_QWEN, lora_r=8, max_length=768, max_steps=3000), learning_rates=(1e-5, 5e-5, 1e-4)
    ),
}


def plan_of(base: str) -> Plan:
    """The plan that belongs to a base: the embedded one has its own, any other the published."""
    return PLANS["embedded" if is_embedded(base) else "qwen2.5-0.5b"]


def find_plan(name: str) -> Plan:
    """The plan of a name (`UserError` for any other)."""
    if name not in PLANS:
        raise UserError(f"plan {name!r}: choose from {', '.join(PLANS)}")
    return PLANS[name]


def forecast_sizes(
    dataset: Dataset,
    protocol: str,
    contexts: Iterable[int] = P5_CONTEXTS,
    split: str = "test",
    limit: int | None = None,
) -> Counter[tuple[int, int]]:
    """How many forecasts of each size a table of a split's first `limit` series needs: (tokens of context, tokens to write) → windows.

    Each forecast is taken to be as long as its truth.
    """
    codec = Codec(fit_scale(dataset.part("train")))
    series = dataset.part(split)[:limit]
    texts = [codec.encode(values) for values in series]
    sizes: Counter[tuple[int, int]] = Counter()
    for context in contexts if protocol == "P5" else [None]:
        for case in make_cases(series, codec, protocol, context):
            steps = texts[case.series][case.start + len(case.context) :].split(codec.step_separator)
            written = steps[: case.skip + len(case.truth)]
            sizes[len(case.context), sum(map(len, written)) + len(written)] += 1  # each step with its separator
    return sizes


def table_cost(config: Config, sizes: Mapping[tuple[int, int], int]) -> Cost:
    """Cost of making forecasts of those sizes with a KV cache and merged adapters."""
    return sum((generation_cost(config, 1, *size) * n for size, n in sizes.items()), Cost())


def run_cost(config: Config, settings: TrainSettings) -> tuple[Cost, Cost]:
    """What a run costs at most, every window as long as the longest: training, and its validations."""
    shape = (settings.batch_size, settings.max_length)
    step, validation = batch_costs(config, settings.adaptation)
    validations = settings.validations(0, settings.max_steps)
    batches = math.ceil(settings.eval_windows / settings.batch_size)
    return step(shape) * settings.max_steps, validation(shape) * (validations * batches)


def plan_table(config: Config, plan: Plan, dataset: Dataset) -> pd.DataFrame:
    """What a plan costs by stage: runs, steps, FLOPs (exact) by kind, both conventions, and shares of the cap.

    Parameters
    ----------
    config
        Architecture of the base, as in `forward_account`.
    dataset : Dataset
        Whose test split is forecast, and some of whose validation split by the sweeps (at precision 2).
    """
    sizes: Counter[tuple[int, int]] = Counter()
    for protocol in PROTOCOLS:
        sizes += forecast_sizes(dataset, protocol)
    table = table_cost(config, sizes)
    brief = table_cost(config, forecast_sizes(dataset, "P5", split="validation", limit=SWEEP_SERIES))
    rows = []
    for stage in dict.fromkeys(["untrained", *(run.stage for run in plan.runs)]):
        runs = [run.settings for run in plan.runs if run.stage == stage]
        each = table if stage in plan.measured else brief if stage in SWEEPS else Cost()
        rows.append({"stage": stage} | _stage_row(config, runs, each))
    return pd.DataFrame(rows).set_index("stage")


def _stage_row(config: Config, runs: Sequence[TrainSettings], measuring: Cost) -> dict[str, float]:
    """A row of `plan_table`: the runs of a stage, each measured at a cost."""
    costs = [run_cost(config, settings) for settings in runs]
    train, validate = (sum((pair[i] for pair in costs), Cost()) for i in (0, 1))
    generate = measuring * max(1, len(runs))  # the untrained base is no run
    total = train + validate + generate
    return {
        "runs": len(runs),
        "steps": sum(settings.max_steps for settings in runs),
        "train": train.flops,
        "validate": validate.flops,
        "generate": generate.flops,
        "exact": total.flops,
        "course": total.flops_course,
        "share of the cap": total.flops / CAP,
    }


def further_steps(config: Config, plan: Plan, table: pd.DataFrame) -> int:
    """How many steps of its last run the rest of the cap would buy, from the plan's `plan_table`; negative if it does not fit."""
    rest = CAP - int(table["exact"].sum())
    last = plan.runs[-1].settings
    return rest // (sum(run_cost(config, last), Cost()).flops // last.max_steps)
