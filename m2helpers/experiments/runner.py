"""Carry out a plan of experiments: every run in order, or side by side (`cluster`), each in its folder, nothing done twice.

A run of a sweep or an ablation that diverges leaves ``diverged.json`` in its folder: why, and with which settings.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import pandas as pd

from ..data import Dataset
from ..engine.losses import Diverged
from ..engine.resume import delete_state, has_state
from ..evaluation.measure import evaluate
from ..evaluation.protocols import P5_CONTEXTS, PROTOCOLS
from ..evaluation.scores import origins, to_json
from ..files import UserError, read_json, write_json
from ..ledger import Ledger
from ..models import Base, load_base
from ..runs import CONFIG_NAME, HISTORY_NAME, RunConfig, is_finished, load_run, read_config, settings_sha256
from ..settings import TrainSettings
from ..text import Codec, fit_scale
from ..training import train_lora
from .planning import ABLATION, FINAL_STAGES, STAGE_ORDER, SWEEP_SERIES, SWEEPS, UNTRAINED, Plan, PlannedRun
from .progress import Progress

WIDENINGS = 2  # times that the grid may grow past an edge
METRICS_NAME = "metrics.json"
DIVERGED_NAME = "diverged.json"
MAY_DIVERGE = (*SWEEPS, ABLATION)  # they look for what works; a long run that diverges ends the plan


class Executor(Protocol):
    """Who carries out the runs of a plan."""

    def room(self) -> bool:
        """Whether one more can begin now."""

    def start(self, run: PlannedRun, whole: bool) -> None:
        """Begin a run, as `Work.carry_out` has it."""

    def finished(self) -> tuple[PlannedRun, bool]:
        """Wait for one of those that have begun; return it, and whether there was something to do."""


class _InTurn:
    """One run after another, in this process."""

    def __init__(self, work: Work) -> None:
        self.work, self.done = work, list[tuple[PlannedRun, bool]]()

    def room(self) -> bool:
        return not self.done

    def start(self, run: PlannedRun, whole: bool) -> None:
        self.done.append((run, self.work.carry_out(run, whole)))

    def finished(self) -> tuple[PlannedRun, bool]:
        return self.done.pop()


@contextmanager
def in_turn(work: Work) -> Iterator[Executor]:
    """Carry out one run after another."""
    yield _InTurn(work)


def run_plan(
    plan: Plan,
    model: str,
    dataset: Dataset,
    output_dir: Path,
    *,
    stages: Iterable[str] = STAGE_ORDER,
    resume: bool = False,
    track: str | None = None,
    ledger: Ledger | None = None,
    say: Callable[[str], None] = print,
    executor: Callable[[Work], AbstractContextManager[Executor]] = in_turn,
) -> Plan:
    """Do what a plan asks for and what is not done yet, in order; return the plan as it was carried out.

    Long runs at the end wait for the grid; any other may begin whenever there is room for it.

    A finished run with the same settings, data and base is kept. A run of a sweep or an ablation that diverges is left
    out, and not tried again while its folder stays. The grid grows by one value past an edge that its best run lies on,
    at most twice. Long runs that adapt the grid's layers take a learning rate that follows from the best there by validation
    loss. Runs of the sweeps forecast some validation series; the stages that the plan measures, the whole test split.

    What a command or a notebook may choose stands here one by one, hence the ten parameters.

    Parameters
    ----------
    model : str
        Name of the base.
    output_dir : Path
        Where the folders go: ``initial``, ``sweep/…``, ``final``, and ``base`` for the untrained base's measurements.
    stages : iterable of str
        Which parts of the plan to carry out.
    resume : bool
        Resume runs that were stopped; without it, such a run is an error.
    track : str, optional
        Log the losses of every run to this tracker (`tracking.TRACKERS`).
    ledger : Ledger, optional
        Where it is charged; by default the base's own (`default_ledger`).
    say : callable
        Is told what is being done, how much of the plan's training is behind, and about how long the rest will take.
    executor : callable
        Who carries out the runs: this process, one after another, or a cluster (`cluster.on_ray`).

    Raises
    ------
    UserError
        If a folder holds a run with other settings, data or base.
    Diverged
        If a long run's loss is no longer a finite number.
    CapReached
        If the next part does not fit under the cap; what is done stays, to be resumed.
    """
    stages, base = tuple(stages), load_base(model)
    work = Work(model, base.sha256, dataset, Path(output_dir), resume, track, ledger, say)
    progress = Progress(base.model.config)
    del base  # every run loads its own
    queue, running, widened = list(plan.runs_of(stages)), list[PlannedRun](), 0
    if UNTRAINED in stages:
        queue.insert(0, PlannedRun(UNTRAINED, plan.initial))
    with executor(work) as hands:
        while queue or running:
            run = next((run for run in queue if _ready(run, queue, running)), None)
            if run and hands.room():
                queue.remove(run)
                if run.stage in FINAL_STAGES and (best := best_of_grid(plan, work.folder)):
                    plan = plan.tuned(best)
                    run = next(tuned for tuned in plan.runs if tuned.name == run.name)
                if run.stage != UNTRAINED:
                    say(progress.line(run, queue, running))
                running.append(run)
                hands.start(run, run.stage in plan.measured)
                continue
            run, worked = hands.finished()
            running.remove(run)
            if run.stage != UNTRAINED:
                progress.note(run, worked=worked)
            if run.stage == "grid" and widened < WIDENINGS and not _of_grid(queue + running):
                plan, more = _widen(plan, work.folder)
                queue, widened = more + queue, widened + 1
                if more:
                    say("the best run lies on the edge of the grid: one value more")
    return plan


def _ready(run: PlannedRun, queue: list[PlannedRun], running: list[PlannedRun]) -> bool:
    """Whether a run may begin: a long one needs the best of the grid, and no two work in one folder."""
    waits = run.stage in FINAL_STAGES and _of_grid(queue + running)
    return not waits and all(run.name != other.name for other in running)


def _of_grid(runs: Iterable[PlannedRun]) -> bool:
    return any(run.stage == "grid" for run in runs)


def _widen(plan: Plan, output_dir: Path) -> tuple[Plan, list[PlannedRun]]:
    """The plan with its grid grown past the edge that the best run lies on, and the runs that are new."""
    best = best_of_grid(plan, output_dir)
    if best is None:  # every run of it diverged
        return plan, []
    wider, before = plan.widened(best), plan.runs_of(["grid"])
    return wider, [run for run in wider.runs_of(["grid"]) if run not in before]


@dataclass(frozen=True)
class Work:
    """What the runs of a plan have in common, and what is done with each."""

    model: str
    base_sha256: str
    dataset: Dataset
    folder: Path
    """Of the plan; every run has its own beneath."""
    resume: bool
    track: str | None
    ledger: Ledger | None
    say: Callable[[str], None]
    progress: bool = True
    """Show a bar while a run trains."""

    def carry_out(self, run: PlannedRun, whole: bool) -> bool:
        """Train a run and measure it, or measure the untrained base; return whether there was something to train."""
        if run.stage == UNTRAINED:
            self.measure_base()
            return False
        worked = self.train(run)
        self.measure(run, whole=whole)
        return worked

    def train(self, run: PlannedRun) -> bool:
        """Train a run, or resume it; leave it as it is when it is finished. Return whether there was something to do."""
        folder = self.folder / run.name
        sha256 = settings_sha256(run.settings, self.dataset, self.base_sha256)
        if is_finished(folder):
            config = read_config(folder)
            if config is None or config["settings_sha256"] != sha256:
                raise UserError(
                    f"{folder}: holds a finished run with other settings, data or base; choose another --output-dir or delete it"
                )
            self.say(f"{run.name}: done before")
            return False
        if run.stage not in MAY_DIVERGE:
            self._train(run, folder)
            return True
        if (reason := _diverged(folder, sha256)) is not None:
            self.say(f"{run.name}: diverged before ({reason}) and is left out; delete {folder} to try it again")
            return False
        (folder / DIVERGED_NAME).unlink(missing_ok=True)  # of other settings
        try:
            self._train(run, folder)
        except Diverged as error:
            write_json(folder / DIVERGED_NAME, {"settings_sha256": sha256, "reason": str(error)})
            delete_state(folder)  # resumed, it would diverge again
            self.say(f"{run.name}: diverged ({error}) and is left out")
        return True

    def _train(self, run: PlannedRun, folder: Path) -> None:
        resume = self.resume and has_state(folder)
        train_lora(
            load_base(self.model),
            self.dataset,
            run.settings,
            folder,
            stage=run.stage,
            resume=resume,
            progress=self.progress,
            track=self.track,
            ledger=self.ledger,
        )

    def measure_base(self) -> None:
        """Measure the untrained base under every protocol."""
        codec = Codec(fit_scale(self.dataset.part("train")))
        self._measure(self.folder / "base", lambda: _Measured(load_base(self.model), codec), PROTOCOLS)

    def measure(self, run: PlannedRun, *, whole: bool) -> None:
        """Measure a run that was not left out: some validation series in a sweep, else, if `whole`, the test split."""
        folder = self.folder / run.name
        if not is_finished(folder):
            return
        if run.stage in MAY_DIVERGE:
            self._measure(folder, lambda: _Measured.load(folder), ["P5"], split="validation", limit=SWEEP_SERIES)
        elif whole:
            self._measure(folder, lambda: _Measured.load(folder), PROTOCOLS)

    def _measure(
        self,
        folder: Path,
        load: Callable[[], _Measured],
        protocols: Iterable[str],
        split: str = "test",
        limit: int | None = None,
    ) -> None:
        """Write measurements into a folder, as far as they are not there."""
        path = folder / METRICS_NAME
        rows = _rows(path)
        if origins(rows) - {(self.dataset.sha256, self.base_sha256)}:
            raise UserError(f"{path}: measured with other data or base; choose another --output-dir or delete it")
        made = Counter(row["protocol"] for row in rows if row["split"] == split)
        protocols = [p for p in protocols if made[p] < (len(P5_CONTEXTS) if p == "P5" else 1)]
        if not protocols:
            return
        self.say(f"{folder.name}: forecasts of the {split} split")
        its = load()
        for protocol in protocols:
            results = evaluate(
                its.base,
                its.codec,
                self.dataset,
                protocol,
                split=split,
                limit=limit,
                run=its.run,
                seed=its.seed,
                constrained=its.constrained,
                ledger=self.ledger,
            )
            rows = [row for row in rows if (row["protocol"], row["split"]) != (protocol, split)]  # some contexts alone
            rows += to_json(results)
            write_json(path, rows)


@dataclass(frozen=True)
class _Measured:
    """What is measured: the untrained base, or a run."""

    base: Base
    codec: Codec
    run: str | None = None
    """Its folder."""
    seed: int | None = None
    constrained: bool = False

    @classmethod
    def load(cls, folder: Path) -> _Measured:
        """A finished run."""
        run = load_run(folder)
        return cls(run.base, run.codec, str(folder), run.settings.seed, run.constrained)


def _rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a ``metrics.json``; none if there is no such file."""
    return cast(list[dict[str, Any]], read_json(path)) if path.is_file() else []


def _diverged(folder: Path, sha256: str) -> str | None:
    """Why a run with these settings was left out; None if it was not."""
    path = folder / DIVERGED_NAME
    record = cast(dict[str, str], read_json(path)) if path.is_file() else {}
    return record["reason"] if record.get("settings_sha256") == sha256 else None


def sweep_table(output_dir: Path, kind: str = "sweep") -> pd.DataFrame:
    """Every finished run of the sweeps: settings, least validation loss, forecast error on validation series, FLOPs.

    Parameters
    ----------
    kind : str
        ``sweep``, or ``ablation`` for the changes to the final setting.
    """
    rows = []
    for path in sorted(Path(output_dir).glob(f"{kind}/*/{HISTORY_NAME}")):
        config, history = cast(RunConfig, read_json(path.with_name(CONFIG_NAME))), pd.read_csv(path)
        names = ("learning_rate", "lora_r", "max_length", "precision", "seed", "max_steps")
        row: dict[str, Any] = {"run": f"{kind}/{path.parent.name}"}
        row |= {name: config["settings"][name] for name in names}
        row |= {"val_loss": history["val_loss"].min(), "flops": int(history["flops"].iloc[-1])}
        for result in _rows(path.with_name(METRICS_NAME)):
            if (result["protocol"], result["split"]) == ("P5", "validation"):
                row[f"MAE, S = {result['context']}"] = result["mae"]
        rows.append(row)
    return pd.DataFrame(rows)


def best_of_grid(plan: Plan, output_dir: Path) -> TrainSettings | None:
    """Settings of the grid's run with the least validation loss; None while one is missing that did not diverge."""
    folders = {run.name: Path(output_dir) / run.name for run in plan.runs_of(["grid"])}
    finished = {name for name, folder in folders.items() if (folder / HISTORY_NAME).is_file()}
    if not finished or any(not (folders[name] / DIVERGED_NAME).is_file() for name in folders.keys() - finished):
        return None
    losses = sweep_table(output_dir).set_index("run")["val_loss"]
    runs = [run for run in plan.runs_of(["grid"]) if run.name in finished]
    return min(runs, key=lambda run: losses[run.name]).settings
