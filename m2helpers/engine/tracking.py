"""Following a run in TensorBoard or Weights & Biases, through `accelerate`. Nothing is tracked unless it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from ..files import UserError
from ..settings import Setting

TRACKERS = ("tensorboard", "wandb")

Log = Callable[[dict[str, float], int], None]


@contextmanager
def tracked(tracker: str | None, folder: Path, settings: Mapping[str, Setting]) -> Iterator[Log]:
    """Yield a function that logs values at a step; one that does nothing when `tracker` is None.

    Parameters
    ----------
    tracker : str, optional
        One of `TRACKERS`. Weights & Biases needs no account when ``WANDB_MODE=offline`` is set.
    folder : Path
        The run folder; the logs go into ``logs`` beneath it.
    settings : mapping
        Of the run, logged once: numbers and switches as numbers, the rest as text.

    Raises
    ------
    UserError
        If the tracker is not known or its package is not installed.
    """
    if tracker is None:
        yield _log_nothing
        return
    if tracker not in TRACKERS:
        raise UserError(f"track {tracker!r}: choose from {', '.join(TRACKERS)}")
    from accelerate import Accelerator
    from accelerate.tracking import get_available_trackers

    if tracker not in [kind.value for kind in get_available_trackers()]:
        raise UserError(f"track {tracker}: the package is not installed; run 'pip install {tracker}'")
    logs = Path(folder) / "logs"
    accelerator = Accelerator(log_with=tracker, project_dir=logs)
    logs.mkdir(parents=True, exist_ok=True)
    plain = {name: _plain(value) for name, value in settings.items()}
    options = {"wandb": {"name": Path(folder).resolve().name, "dir": str(logs)}}
    accelerator.init_trackers("m2helpers", config=plain, init_kwargs=options)

    def log(values: dict[str, float], step: int) -> None:
        accelerator.log(values, step=step)

    try:
        yield log
    finally:
        accelerator.end_training()


def _log_nothing(values: dict[str, float], step: int) -> None:
    pass


def _plain(value: Setting) -> int | float | str:
    if isinstance(value, bool):
        return int(value)  # as `settings.canonical` has it
    return value if isinstance(value, int | float) else str(value)
