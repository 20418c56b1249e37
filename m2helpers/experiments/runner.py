"""Carry out a plan of experiments: every run in order, each in its folder, nothing done twice."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path

import pandas as pd

from ..data import Dataset
from ..engine.resume import has_state
from ..evaluation.measure import evaluate
from ..evaluation.protocols import P5_CONTEXTS, PROTOCOLS
from ..evaluation.scores import origins, to_json
from ..files import UserError, read_json, write_json
from ..flops.costs import Cost
from ..models import load_base
from ..runs import is_finished, load_run, settings_sha256
from ..settings import TrainSettings
from ..text import Codec, fit_scale
from ..training import train_lora
from .planning import ABLATION, FINAL_STAGES, STAGE_ORDER, SWEEP_SERIES, SWEEPS, Plan, PlannedRun, run_cost

WIDENINGS = 2  # times that the grid may grow past an edge
METRICS_NAME = "metrics.json"


def run_plan(
    plan: Plan,
    model: str,
    dataset: Dataset,
    output_dir: Path,
    *,
    stages: Iterable[str] = STAGE_ORDER,
    resume: bool = False,
    track: str | None = None,
    say: Callable[[str], None] = print,
) -> Plan:
    """Do what a plan asks for and what is not done yet, in order; return the plan as it was carried out.

    A finished run with the same settings, data and base is kept. The grid grows by one value past an edge that its best run
    lies on, at most twice. Long runs that adapt the grid's layers take a learning rate that follows from the best there by validation
    loss. Runs of the sweeps forecast some validation series; the stages that the plan measures, the whole test split.

    Parameters
    ----------
    model : str
        Name of the base.
    output_dir : Path
        Where the folders go: ``initial``, ``sweep/…``, ``final``, and ``base`` for the untrained base's measurements.
    stages : iterable of str
        Which parts of the plan to carry out.
    resume : bool
        Go on with runs that were stopped; without it, such a run is an error.
    track : str, optional
        Log the losses of every run to this tracker (`tracking.TRACKERS`).
    say : callable
        Is told what is being done, how much of the plan's training is behind, and about how long the rest will take.

    Raises
    ------
    UserError
        If a folder holds a run with other settings, data or base.
    CapReached
        If the next part does not fit under the cap; what is done stays, to be gone on with.
    """
    output_dir, stages = Path(output_dir), tuple(stages)
    base, done, widened = load_base(model), 0, 0
    base_sha256, config = base.sha256, base.model.config
    del base  # every run loads its own

    @cache
    def price(run: PlannedRun) -> int:
        return sum(run_cost(config, run.settings), Cost()).flops

    if "untrained" in stages:
        _measure(output_dir / "base", model, base_sha256, dataset, PROTOCOLS, say)
    queue = list(plan.runs_of(stages))
    behind, trained, started = 0, 0, time.monotonic()  # FLOPs of the plan's training: behind us, and done in this call
    while queue:
        run = queue.pop(0)
        if run.stage in FINAL_STAGES and (best := best_of_grid(plan, output_dir)):
            plan = plan.tuned(best)
            run = next(tuned for tuned in plan.runs if tuned.name == run.name)
        done += 1
        ahead = sum(map(price, [run, *queue]))
        place = f"{behind / (behind + ahead):.0%} of the training behind"
        if trained:
            place += f", about {(time.monotonic() - started) * ahead / trained / 60:,.0f} minutes left"
        say(f"[{done}/{done + len(queue)}] {run.name}: {run.settings.max_steps:,} steps; {place}")
        behind += price(run)
        if _run(run, output_dir / run.name, model, base_sha256, dataset, resume, track, say):
            trained += price(run)  # some of it was done before, where a stopped run goes on: the first guess is low
        if run.stage in (*SWEEPS, ABLATION):
            few = dict(split="validation", limit=SWEEP_SERIES)
            _measure(output_dir / run.name, None, base_sha256, dataset, ["P5"], say, **few)
        elif run.stage in plan.measured:
            _measure(output_dir / run.name, None, base_sha256, dataset, PROTOCOLS, say)
        if run.stage == "grid" and "grid" not in {left.stage for left in queue} and widened < WIDENINGS:
            wider = plan.widened(best_of_grid(plan, output_dir))
            more = [run for run in wider.runs_of(["grid"]) if run not in plan.runs_of(["grid"])]
            if more:
                say("the best run lies on the edge of the grid: one value more")
            queue, plan, widened = more + queue, wider, widened + 1
    return plan


def sweep_table(output_dir: Path, kind: str = "sweep") -> pd.DataFrame:
    """Every finished run of the sweeps: settings, least validation loss, forecast error on validation series, FLOPs.

    Parameters
    ----------
    kind : str
        ``sweep``, or ``ablation`` for the changes to the final setting.
    """
    rows = []
    for path in sorted(Path(output_dir).glob(f"{kind}/*/history.csv")):
        settings, history = read_json(path.with_name("config.json"))["settings"], pd.read_csv(path)
        names = ("learning_rate", "lora_r", "max_length", "precision", "seed", "max_steps")
        row = {"run": f"{kind}/{path.parent.name}"} | {name: settings[name] for name in names}
        row |= {"val_loss": history["val_loss"].min(), "flops": int(history["flops"].iloc[-1])}
        metrics = path.with_name(METRICS_NAME)
        for result in read_json(metrics) if metrics.is_file() else []:
            if (result["protocol"], result["split"]) == ("P5", "validation"):
                row[f"MAE, S = {result['context']}"] = result["mae"]
        rows.append(row)
    return pd.DataFrame(rows)


def best_of_grid(plan: Plan, output_dir: Path) -> TrainSettings | None:
    """Settings of the grid's run with the least validation loss; None while a run of the grid is missing."""
    runs = plan.runs_of(["grid"])
    if not all((Path(output_dir) / run.name / "history.csv").is_file() for run in runs):
        return None
    losses = sweep_table(output_dir).set_index("run")["val_loss"]
    return min(runs, key=lambda run: losses[run.name]).settings


def _run(
    run: PlannedRun,
    folder: Path,
    model: str,
    base_sha256: str,
    dataset: Dataset,
    resume: bool,
    track: str | None,
    say: Callable,
) -> bool:
    """Train a run, or go on with it; leave it as it is when it is finished. Return whether there was something to do."""
    if not is_finished(folder):
        going_on = resume and has_state(folder)
        train_lora(load_base(model), dataset, run.settings, folder, stage=run.stage, resume=going_on, track=track)
        return True
    if read_json(folder / "config.json")["settings_sha256"] != settings_sha256(run.settings, dataset, base_sha256):
        raise UserError(
            f"{folder}: holds a finished run with other settings, data or base; choose another --output-dir or delete it"
        )
    say(f"{run.name}: done before")
    return False


def _measure(
    folder: Path,
    model: str | None,
    base_sha256: str,
    dataset: Dataset,
    protocols: Iterable[str],
    say: Callable,
    split: str = "test",
    limit: int | None = None,
) -> None:
    """Write the measurements of a run, or of an untrained base, into its folder, as far as they are not there."""
    path = folder / METRICS_NAME
    rows = read_json(path) if path.is_file() else []
    if origins(rows) - {(dataset.sha256, base_sha256)}:
        raise UserError(f"{path}: measured with other data or base; choose another --output-dir or delete it")
    made = Counter(row["protocol"] for row in rows if row["split"] == split)
    protocols = [p for p in protocols if made[p] < (len(P5_CONTEXTS) if p == "P5" else 1)]
    if not protocols:
        return
    say(f"{folder.name}: forecasts of the {split} split")
    if model:
        base, codec, about = load_base(model), Codec(fit_scale(dataset.part("train"))), {}
    else:
        run = load_run(folder)
        base, codec, about = run.base, run.codec, dict(run=str(folder), seed=run.settings.seed)
        about["constrained"] = run.constrained
    for protocol in protocols:
        rows = [row for row in rows if (row["protocol"], row["split"]) != (protocol, split)]  # some contexts alone
        rows += to_json(evaluate(base, codec, dataset, protocol, split=split, limit=limit, **about))
        write_json(path, rows)
