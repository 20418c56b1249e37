"""The training loop: step, validate, save, show how far it is, and stop between two steps with nothing lost.

It knows when; what a step, a validation and a save are is up to the run (`Work`): fine-tuning or pre-training. Several
processes that share a run (`processes`) go through it side by side, and stop after the same step whichever was asked to.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import FrameType
from typing import Protocol

from tqdm.auto import tqdm

from ..files import UserError
from .processes import any_of, count, end, everyones, rank
from .resume import State


class Stopped(UserError):
    """The work was asked to stop, saved what it had, and says how to go on."""


class Work(Protocol):
    """A run, as the loop sees it."""

    @property
    def state(self) -> State:
        """Where the run stands; restored already when it is resumed."""

    @property
    def max_steps(self) -> int:
        """Steps after which it is done."""

    @property
    def save_steps(self) -> int:
        """Steps between saves."""

    def interval(self, stop: int) -> AbstractContextManager[None]:
        """Entered for the steps up to `stop` and the save after them: the place to reserve what they can cost."""

    def step(self) -> str:
        """Take a step, set `state.due` if a validation follows it, and return what the bar shows."""

    def validate(self, asked_to_stop: Callable[[], bool]) -> None:
        """Validate and clear `state.due`; when asked to stop, it may be left due."""

    def save(self) -> None:
        """Keep the state and everything else the next step depends on."""


def run_steps(
    work: Work, name: str, *, progress: bool = True, resumable: bool = True, stop_after: float | None = None
) -> None:
    """Take a run from where it stands to its end, or until its time is up.

    Parameters
    ----------
    work : Work
    name : str
        What the bar and the messages call it.
    progress : bool
        Show a bar with the time left.
    resumable : bool
        Whether its saves are on disk, so that the message of a stop may say so.
    stop_after : float, optional
        Minutes after which to save and return, at least one step further.

    Raises
    ------
    Stopped
        On Ctrl-C or SIGTERM, once the step in hand is done and everything is saved.
    """
    state, started = work.state, time.monotonic()
    if len(set(everyones(state.step))) > 1:
        end(UserError(f"{name}: the processes found different saves; give a folder on a disk that all of them see"))

    def finished() -> bool:
        return state.step >= work.max_steps and not state.due

    def stopping() -> bool:
        return any_of(asked_to_stop() or (stop_after is not None and time.monotonic() - started > 60 * stop_after))

    shown = dict(desc=name, unit="step", mininterval=1, total=work.max_steps, initial=state.step)
    with stop_on_signal() as asked_to_stop, tqdm(**shown, disable=not progress or rank() > 0) as bar:
        while not finished():
            stop = min(work.max_steps, (state.step // work.save_steps + 1) * work.save_steps)
            with work.interval(stop):
                while state.step < stop or state.due:
                    if not state.due:
                        bar.set_postfix_str(work.step(), refresh=False)
                        bar.update()
                    if state.due:
                        work.validate(stopping)
                    if stopping():
                        break
                work.save()  # before the bill is settled: a ledger that cannot be reached then loses no step
            if any_of(asked_to_stop()) and not finished():
                remedy = "; --resume goes on from there" if resumable else ""
                end(Stopped(f"{name}: stopped at step {state.step:,} of {work.max_steps:,}{remedy}"))
            if stopping():
                break


@contextmanager
def stop_on_signal() -> Iterator[Callable[[], bool]]:
    """Let Ctrl-C and SIGTERM wait for the end of the step in hand; a second one interrupts at once, unless several processes
    share the run: their launcher passes on what they have got already.

    Yields
    ------
    callable
        Whether a stop was asked for. In a thread other than the main one, which gets no signals, always False.
    """
    asked: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if asked and count() == 1:
            raise KeyboardInterrupt
        asked.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
