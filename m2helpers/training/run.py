"""A run of fine-tuning: reserved on the ledger, billed, shown, logged, saved, resumed and kept."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import pandas as pd
from torch import nn
from tqdm.auto import tqdm

from ..data import Dataset
from ..engine.loop import run_steps
from ..engine.processes import by_first, check_batch, rank
from ..engine.resume import load_state, save_state
from ..engine.tracking import Log, tracked
from ..engine.writer import one_writer
from ..files import UserError, write_json
from ..ledger import Bill, Ledger, Spender, default_ledger
from ..models import Base
from ..runs import check_folder, describe, finish
from ..settings import STAGES, TrainSettings
from ..simulator import Law
from ..text import Codec, fit_scale
from .steps import Training, TrainState

LOOK = 1.0  # seconds between two looks at the losses of a GPU, which wait for it


class TrainResult(NamedTuple):
    """What `train_lora` gives back."""

    model: nn.Module
    """The base with the best updates loaded, in evaluation mode."""
    history: pd.DataFrame
    """One row a validation: step, loss, val_loss, learning_rate, tokens_per_second, flops."""


@one_writer
def train_lora(
    base: Base,
    dataset: Dataset,
    settings: TrainSettings = STAGES["initial"],
    output_dir: Path | None = None,
    *,
    stage: str = "trial",
    law: Law | None = None,
    resume: bool = False,
    progress: bool = True,
    track: str | None = None,
    ledger: Ledger | None = None,
    compiled: bool = True,
) -> TrainResult:
    """Fine-tune a base on the training split of a dataset, and charge it to the base's ledger.

    Parameters
    ----------
    base : Base
        As `load_base` gives it; its model is adapted in place.
    dataset : Dataset
    settings : TrainSettings
    output_dir : Path, optional
        The run folder. Without one, nothing is written.
    stage : str
        Part of the plan that the run belongs to, for the ledger.
    law : Law, optional
        Train on systems drawn from it without end, and not on the training split, whose scale is kept all the same.
    resume : bool
        Resume from the last save in `output_dir`.
    progress : bool
        Show a bar with loss, tokens/s, FLOPs and the time left.
    track : str, optional
        Log losses to this tracker (`tracking.TRACKERS`) as well; needs `output_dir`.
    ledger : Ledger, optional
        Where it is charged; by default the base's own (`default_ledger`).
    compiled : bool
        On a GPU, compile the training step (`engine.compiled`). A CPU never does.

    Returns
    -------
    TrainResult

    Raises
    ------
    UserError
        If the folder holds a run already, or nothing to resume, or a run with other settings.
    Diverged
        If the loss is no longer a finite number. The step is billed; on a GPU, so are those up to the next look at the loss.
    CapReached
        If the steps up to the next save do not fit under the cap; what was saved before stays, to be resumed.
    Stopped
        On Ctrl-C or SIGTERM, once the step in hand is done and everything is saved.
    """
    folder = Path(output_dir) if output_dir is not None else None
    if track and not folder:
        raise UserError("track needs the output_dir of the run")
    name = folder.resolve().name if folder else "unsaved"
    codec = Codec(fit_scale(dataset.part("train")), settings.precision)
    config = describe(base, dataset, settings, codec, stage, law)
    check_batch("batch_size", settings.batch_size)
    by_first(lambda: check_folder(folder, config, resume))
    work = Training(base, dataset, settings, codec, law, compiled)
    if folder and resume:
        work.state = load_state(folder, work.parameters, work.optimizer, TrainState, work.best)
    elif folder and rank() == 0:
        write_json(folder / "config.json", config)

    spender = Spender(name, stage, config["settings_sha256"])
    with tracked(track if rank() == 0 else None, folder or Path(), asdict(settings)) as log:
        charged = _Charged(work, ledger, spender, folder, log)
        run_steps(charged, name, progress=progress, resumable=folder is not None)
    for key, p in work.parameters.items():
        p.data.copy_(work.best[key])
    history = pd.DataFrame(work.state.history)
    if folder and rank() == 0:
        finish(folder, history, config, settings, base)
    return TrainResult(base.model.eval(), history)


class _Charged:
    """A run as the loop sees it: each interval is reserved on the ledger, each step billed, shown and logged."""

    def __init__(self, run: Training, ledger: Ledger | None, spender: Spender, folder: Path | None, log: Log) -> None:
        self.run, self.ledger, self.spender, self.folder, self.log = run, ledger, spender, folder, log
        self.state, self.max_steps, self.save_steps = run.state, run.settings.max_steps, run.settings.save_steps
        self.bill: Bill | None = None
        self.started, self.tokens = time.monotonic(), 0
        self.looked, self.logged, self.shown = -math.inf, len(run.state.losses), ""

    @contextmanager
    def interval(self, stop: int) -> Iterator[None]:
        step = self.state.step
        saved = f"; --resume goes on from step {step:,}" if self.folder and step else ""
        place = f"stopped at step {step:,} of {self.max_steps:,}{saved}. "
        with ExitStack() as reserved:

            def reserve() -> None:
                self.ledger = self.ledger or default_ledger(self.run.base)
                most = self.run.most(stop)
                self.bill = reserved.enter_context(self.ledger.reserve(self.spender, place, **most))

            by_first(reserve)  # the others have no bill
            yield

    def step(self) -> str:
        compiling = self._compiling()
        self.tokens += self.run.step(self.bill).tokens
        if seconds := self._compiling() - compiling:
            tqdm.write(f"compiling the training step took {seconds:.0f} s, which tokens/s count too")
        if not self.run.fixed or time.monotonic() - self.looked > LOOK:
            self._look()
        return self.shown

    def _compiling(self) -> float:
        return self.run.fixed.seconds if self.run.fixed else 0.0

    def _look(self) -> None:
        """Wait for a GPU, and show and log the losses since the last look."""
        run, state = self.run, self.state
        run.read_losses(state.step)
        new = state.losses[self.logged :]
        for step, loss in enumerate(new, state.step - len(new) + 1):
            self.log({"loss": loss, "learning_rate": run.settings.rate(step - 1)}, step)
        if new:
            state.speed = round(self.tokens / (time.monotonic() - self.started), 1)
            self.shown = f"loss {new[-1]:.3f}, {state.speed:,.0f} tokens/s, {state.flops:.2e} FLOPs"
        self.logged, self.looked = len(state.losses), time.monotonic()

    def validate(self, asked_to_stop: Callable[[], bool]) -> None:
        self._look()
        self.run.validate(asked_to_stop, self.bill)
        if not self.state.due:
            self.logged = 0
            self.log({"val_loss": self.state.history[-1]["val_loss"]}, self.state.step)

    def save(self) -> None:
        self._look()  # a loss that is no number is refused before it is saved
        if self.folder and rank() == 0:
            save_state(self.folder, self.run.parameters, self.run.optimizer, self.state, self.run.best)
