"""One writer a run's folder: a second is refused."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import wraps
from pathlib import Path
from typing import ParamSpec, TypeVar

from filelock import SoftFileLock, Timeout

from ..files import UserError
from .processes import by_first

Arguments = ParamSpec("Arguments")
Outcome = TypeVar("Outcome")
LOCK_NAME = ".writer.part"  # deleted with a run's states (`resume.delete_state`), so that no finished run keeps it


@contextmanager
def sole_writer(folder: str | os.PathLike | None) -> Iterator[None]:
    """Hold a folder for the one run that writes into it; None is no folder, and nothing is held.

    The folder is made when it does not exist, and deleted again if nothing was written into it.

    Raises
    ------
    UserError
        If another run holds it. The lock of a process that is dead holds nothing.
    """
    if folder is None:
        yield
        return
    folder = Path(folder)
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock = _lock(folder)
        try:
            yield
        finally:
            lock.release()
    finally:
        with suppress(OSError):  # not empty
            for path in missing:
                path.rmdir()


def one_writer(run: Callable[Arguments, Outcome]) -> Callable[Arguments, Outcome]:
    """Let a function that fills the folder `output_dir` do so as its `sole_writer`; of several processes, the first writes."""
    signature = inspect.signature(run)

    @wraps(run)
    def alone(*args: Arguments.args, **options: Arguments.kwargs) -> Outcome:
        folder = signature.bind(*args, **options).arguments.get("output_dir")
        with ExitStack() as held:
            by_first(lambda: held.enter_context(sole_writer(folder)))
            return run(*args, **options)

    return alone


def _lock(folder: Path) -> SoftFileLock:
    lock = SoftFileLock(folder / LOCK_NAME, timeout=0)  # a file that names its owner: it needs no locks of the system
    try:
        lock.acquire()
    except Timeout as error:
        whose = f"process {lock.pid}; wait, stop it, or choose another folder"
        if owner := str(error).partition(" is held by ")[2]:  # of another host or container: it may be dead
            whose = f"another process ({owner.rstrip('.')}); wait, or delete {lock.lock_file} if it is gone"
        raise UserError(f"{folder}: run is being written by {whose}") from None
    return lock
