"""Plans of experiments as data, and what they cost before anything runs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import pandas as pd

from .costs import Cost, forward_cost, generation_cost
from .data import Dataset
from .evaluation import P5_CONTEXTS, PROTOCOLS, make_cases
from .files import UserError
from .flops import CAP
from .settings import STAGES, TrainSettings
from .text import Codec, fit_scale


@dataclass(frozen=True)
class PlannedRun:
    """One fine-tuning run of a plan."""

    stage: str
    """`initial`, `grid`, `context`, `precision` or `final`."""
    name: str
    """Of its folder."""
    settings: TrainSettings


@dataclass(frozen=True)
class Plan:
    """Runs in their order, and whose forecasts are measured."""

    runs: tuple[PlannedRun, ...]
    measured: tuple[str, ...] = ("untrained", "initial", "final")
    """Stages whose forecasts are made under every protocol."""


def make_plan(
    initial: TrainSettings,
    final: TrainSettings,
    *,
    learning_rates: Iterable[float],
    ranks: Iterable[int] = (2, 4, 8),
    contexts: Iterable[int] = (128, 512, 768),
    precisions: Iterable[int] = (2, 3),
    sweep_steps: int = 500,
) -> Plan:
    """Build a plan: an initial run, a grid of learning rate × rank, contexts, precisions, a final run.

    The sweep starts from the initial run's settings. One run of rank 0 (head bias alone) stands in the grid as a control.
    """
    short = replace(initial, max_steps=sweep_steps)
    rates = list(learning_rates)
    grid = [replace(short, learning_rate=rate, lora_r=rank) for rate in rates for rank in ranks]
    grid.append(replace(short, learning_rate=max(rates), lora_r=0))
    runs = [PlannedRun("initial", "initial", initial)]
    runs += [PlannedRun("grid", f"grid-lr{s.learning_rate:g}-r{s.lora_r}", s) for s in grid]
    runs += [PlannedRun("context", f"context-{n}", replace(short, max_length=n)) for n in contexts]
    runs += [PlannedRun("precision", f"precision-{p}", replace(short, precision=p)) for p in precisions]
    return Plan((*runs, PlannedRun("final", "final", final)))


_QWEN = TrainSettings(lora_r=4, learning_rate=1e-4, max_length=512, max_steps=1000)
PLANS: dict[str, Plan] = {
    "embedded": make_plan(STAGES["initial"], STAGES["final"], learning_rates=(5e-4, 1e-3, 2e-3), sweep_steps=250),
    "qwen2.5-0.5b": make_plan(  # as published
        _QWEN, replace(_QWEN, lora_r=8, max_length=768, max_steps=3000), learning_rates=(1e-5, 5e-5, 1e-4)
    ),
}


def find_plan(name: str) -> Plan:
    """The plan of a name (`UserError` for any other)."""
    if name not in PLANS:
        raise UserError(f"plan {name!r}: choose from {', '.join(PLANS)}")
    return PLANS[name]


def forecast_sizes(
    dataset: Dataset, protocol: str, contexts: Iterable[int] = P5_CONTEXTS, split: str = "test"
) -> Counter[tuple[int, int]]:
    """How many forecasts of each size a table needs: (tokens of context, tokens to write) → windows.

    Each forecast is taken to be as long as its truth.
    """
    codec = Codec(fit_scale(dataset.part("train")))
    texts = [codec.encode(values) for values in dataset.part(split)]
    sizes: Counter[tuple[int, int]] = Counter()
    for context in contexts if protocol == "P5" else [None]:
        for case in make_cases(dataset.part(split), codec, protocol, context):
            steps = texts[case.series][case.start + len(case.context) :].split(codec.step_separator)
            written = steps[: case.skip + len(case.truth)]
            sizes[len(case.context), sum(map(len, written)) + len(written)] += 1  # each step with its separator
    return sizes


def table_cost(config: object, sizes: Mapping[tuple[int, int], int]) -> Cost:
    """Cost of making forecasts of those sizes with a KV cache and merged adapters."""
    return sum((generation_cost(config, 1, *size) * n for size, n in sizes.items()), Cost())


def run_cost(config: object, settings: TrainSettings) -> tuple[Cost, Cost]:
    """What a run costs at most, every window as long as the longest: training, and its validations."""
    adapted = dict(lora_r=settings.lora_r, target_modules=settings.target_modules)
    step = forward_cost(config, settings.batch_size, settings.max_length, loss=True, **adapted)
    validations = sum(map(settings.validates, range(1, settings.max_steps + 1)))
    batches = math.ceil(settings.eval_windows / settings.batch_size)
    return step * (3 * settings.max_steps), step * (validations * batches)


def plan_table(config: object, plan: Plan, dataset: Dataset) -> pd.DataFrame:
    """What a plan costs by stage: runs, steps, FLOPs (exact) by kind, both conventions, and shares of the cap.

    Parameters
    ----------
    config
        Architecture of the base, as in `forward_account`.
    dataset : Dataset
        Whose test split is forecast.
    """
    sizes: Counter[tuple[int, int]] = Counter()
    for protocol in PROTOCOLS:
        sizes += forecast_sizes(dataset, protocol)
    table = table_cost(config, sizes)
    rows = []
    for stage in dict.fromkeys(["untrained", *(run.stage for run in plan.runs)]):
        runs = [run.settings for run in plan.runs if run.stage == stage]
        costs = [run_cost(config, settings) for settings in runs]
        train, validate = (sum((pair[i] for pair in costs), Cost()) for i in (0, 1))
        generate = table if stage in plan.measured else Cost()
        total = train + validate + generate
        row = {"stage": stage, "runs": len(runs), "steps": sum(settings.max_steps for settings in runs)}
        row |= {"train": train.flops, "validate": validate.flops, "generate": generate.flops}
        rows.append(row | {"exact": total.flops, "course": total.flops_course, "share of the cap": total.flops / CAP})
    return pd.DataFrame(rows).set_index("stage")


def further_steps(config: object, plan: Plan, dataset: Dataset) -> int:
    """How many steps of its last run the rest of the cap would buy; negative when the plan does not fit."""
    rest = CAP - int(plan_table(config, plan, dataset)["exact"].sum())
    last = plan.runs[-1].settings
    return rest // (sum(run_cost(config, last), Cost()).flops // last.max_steps)
