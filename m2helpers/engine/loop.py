"""Stopping long work between two steps, with nothing lost."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ..files import UserError


class Stopped(UserError):
    """The work was asked to stop, saved what it had, and says how to go on."""


@contextmanager
def stop_on_signal() -> Iterator[Callable[[], bool]]:
    """Let Ctrl-C and SIGTERM wait for the end of the step in hand; a second one interrupts at once.

    Yields
    ------
    callable
        Whether a stop was asked for. In a thread other than the main one, which gets no signals, always False.
    """
    asked: list[int] = []

    def note(number, frame):
        if asked:
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
