"""Several processes that train one model: those that ``torchrun`` or ``accelerate launch`` started, seen from one of them.

Each has the whole model and takes its share of every batch; gradients are added up, so that all of them take the same step.
The first process (rank 0) alone writes, logs and bills. With one process, nothing here does anything.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from datetime import timedelta
from typing import NoReturn, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist

from ..files import UserError

TIMEOUT = timedelta(minutes=15)  # that one may wait for another: a ledger that cannot be reached takes three
T = TypeVar("T")
Rows = TypeVar("Rows", range, list, np.ndarray, torch.Tensor)


class EndedElsewhere(UserError):
    """The first process has ended the run, with this message."""


def count() -> int:
    """How many processes share the run."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """The number of this process among them, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def local_count() -> int:
    """How many of them run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if count() > 1 else 1


def share(rows: Rows) -> Rows:
    """The rows of a batch that are this process's: dealt out in turn, so that two shares differ by one row at most."""
    return rows[rank() :: count()]


def check_batch(name: str, size: int) -> None:
    """Refuse a batch with fewer rows than there are processes (`UserError`)."""
    if size < count():
        end(UserError(f"{name} {size}: fewer than the {count()} processes; start {size} or fewer, or give more rows"))


def everyones(value: T) -> list[T]:
    """What every process gives, by rank. All of them have to ask.

    Raises
    ------
    UserError
        If one of them is gone, or does not answer within `TIMEOUT`.
    """
    if count() == 1:
        return [value]
    values: list[T | None] = [None] * count()
    with all_there():
        dist.all_gather_object(values, value)
    return cast(list[T], values)


def sums(values: Iterable[float]) -> list[float]:
    """Numbers added up over the processes, each for itself; the same everywhere, to the last bit."""
    values = list(values)
    return _reduced(values, dist.ReduceOp.SUM) if count() > 1 else values


def any_of(value: bool) -> bool:
    """Whether it is so in any process."""
    return any(_reduced([value], dist.ReduceOp.MAX)) if count() > 1 else value


def _reduced(values: Sequence[float], how: dist.ReduceOp.RedOpType) -> list[float]:
    numbers = torch.tensor(values, dtype=torch.float64)  # on the CPU: no GPU waits for it
    with all_there():
        dist.all_reduce(numbers, how)
    return numbers.tolist()


def add_up(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Add up the gradients of all processes, in place: each then has the gradient of the whole batch.

    Raises
    ------
    UserError
        As `everyones`.
    """
    if count() == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    together = torch.cat([gradient.flatten() for gradient in gradients])
    with all_there():
        dist.all_reduce(together)
    for gradient, whole in zip(gradients, together.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(whole.view_as(gradient))


def by_first(work: Callable[[], T]) -> T:
    """Let the first process do something, such as reserving on the ledger; all wait, and get what it returned.

    Raises
    ------
    UserError
        What the work raised, in the first process.
    EndedElsewhere
        In the others, if it raised that.
    """
    made: tuple[T | None, str | None] = (None, None)
    if rank() == 0:
        try:
            made = work(), None
        except UserError as error:
            everyones((None, str(error)))
            raise
    result, failure = everyones(made)[0]
    if failure is not None:
        raise EndedElsewhere(failure)
    return cast(T, result)


def end(error: UserError) -> NoReturn:
    """Raise an error that all processes have come to; in all but the first as `EndedElsewhere`, for one message is enough."""
    raise error if rank() == 0 else EndedElsewhere(str(error))


@contextmanager
def all_there() -> Iterator[None]:
    """Tell of a process that is gone, or does not answer, in words (`UserError`)."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):  # its errors are of no kind of their own
            raise
        raise UserError(
            f"another of the {count()} processes has ended, or hangs; its own message says why, and --resume goes on from "
            "the last save"
        ) from None


@contextmanager
def joined(device: str) -> Iterator[None]:
    """Be one of the processes that were started together, while the block lasts. All but the first keep silent.

    Parameters
    ----------
    device : str
        ``cpu``, or ``cuda`` for a GPU of its own for each process.

    Raises
    ------
    UserError
        If this machine has fewer GPUs than processes, or the processes do not find each other.
    """
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if device == "cuda":
        if here > torch.cuda.device_count():
            raise UserError(
                f"{here} processes and {torch.cuda.device_count()} GPUs; start one for each, or set M2_DEVICE=cpu"
            )
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo", timeout=TIMEOUT)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"the processes do not find each other ({error}); start them with torchrun") from None
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere if rank() else sys.stdout):
        if rank():
            warnings.simplefilter("ignore")
        try:
            yield
        except EndedElsewhere:
            with suppress(UserError):  # comes to nothing once the first has spoken, and is gone
                everyones(None)  # a launcher kills it if another goes before
            sys.exit(1)
    dist.destroy_process_group()  # not after an error: the others are to wait until this process is gone
