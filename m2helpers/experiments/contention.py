"""How threads that wait for one another should wait: measured on idle cores, and beside programs that keep them busy.

OpenMP's threads meet hundreds of times in a forward pass. One that spins until the others come is there at once, and keeps
its core from whoever has work; one that sleeps has to be woken. The rule is read once, when PyTorch loads its OpenMP
library, so every side has a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from ..data import load_dataset
from ..forecasting import forecast
from ..ledger import Ledger
from ..models import load_base
from ..settings import EMBEDDED
from ..text import Codec, fit_scale
from ..training import series_loss

# GNU's library, which PyTorch's Linux wheels bring, spins 300,000 times (some milliseconds) unless it is told otherwise.
SIDES = {
    "as OpenMP comes": {"GOMP_SPINCOUNT": "300000"},
    "spins 30,000 times": {"GOMP_SPINCOUNT": "30000"},
    "spins 3,000 times": {"GOMP_SPINCOUNT": "3000"},
    "spins 300 times": {"GOMP_SPINCOUNT": "300"},
    "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
}
VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
FORECASTS, AHEAD = 20, 2  # series forecast at once, steps each
VALIDATED, LENGTH = 1, 256  # series of the validation, tokens of their windows


def compare_waiting(data: Path, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of every round by work ("forecasts, idle cores" and its like) and side; the sides take turns.

    Parameters
    ----------
    data : Path
        The dataset that is forecast and validated on.
    """
    seconds: dict[str, dict[str, list[float]]] = {}
    with ExitStack() as stack:
        workers = {side: stack.enter_context(_worker(data, changes)) for side, changes in SIDES.items()}
        for worker in workers.values():
            _ask(worker)  # loads, and warms up
        for _ in range(rounds):
            for busy in (0, os.cpu_count() or 1):
                beside = f"beside {busy} busy processes" if busy else "idle cores"
                for side, worker in workers.items():
                    with _busy(busy):
                        measured = _ask(worker)
                    for work, value in measured.items():
                        seconds.setdefault(f"{work}, {beside}", {}).setdefault(side, []).append(value)
    return seconds


@contextmanager
def _worker(data: Path, changes: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    """A process that measures once whenever it is asked to (`_ask`)."""
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES} | changes
    command = [sys.executable, "-m", __name__, str(data)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, text=True, env=environment, stdin=pipe, stdout=pipe) as worker:
        yield worker  # it ends when its input does


def _ask(worker: subprocess.Popen[str]) -> dict[str, float]:
    assert worker.stdin and worker.stdout
    print(file=worker.stdin, flush=True)
    return json.loads(worker.stdout.readline())


@contextmanager
def _busy(n: int) -> Iterator[None]:
    """Keep `n` cores busy."""
    spinners = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(n)]
    try:
        yield
    finally:
        for spinner in spinners:
            spinner.kill()
            spinner.wait()


def _work(data: Path) -> None:
    """Answer every line on the input with the seconds that each piece of work took."""
    dataset, base = load_dataset(data), load_base(EMBEDDED)
    codec = Codec(fit_scale(dataset.part("train")))
    series = [values[:10] for values in dataset.part("train")[:FORECASTS]]
    validated = dataset.part("validation")[:VALIDATED]
    with tempfile.TemporaryDirectory() as folder:
        ledger = Ledger(Path(folder) / "ledger.sqlite")
        work = {
            "forecasts": lambda: forecast(base, codec, series, AHEAD, ledger=ledger),
            "validation": lambda: series_loss(base, codec, validated, LENGTH, ledger),
        }
        for _ in sys.stdin:
            taken = {}
            for name, run in work.items():
                started = time.perf_counter()
                run()
                taken[name] = time.perf_counter() - started
            print(json.dumps(taken), flush=True)


if __name__ == "__main__":
    _work(Path(sys.argv[1]))
