"""The runs of a plan side by side, on the cores and machines of a Ray cluster.

The plan stays what it is, and so do its records: a worker does with a run what one process would have done, with as many
threads as it has cores. A run whose worker is lost goes on from its last save on another.
"""

from __future__ import annotations

import os
import secrets
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from tqdm.auto import tqdm

from ..engine.loop import Stopped, stop_on_signal
from ..engine.writer import LOCK_NAME, sole_writer
from ..files import UserError
from .planning import PlannedRun
from .runner import Work

LOSSES = 3  # of workers that one run may suffer
GRACE = 30.0  # seconds that a lost worker's process has to be gone
STORE = 80 * 2**20  # bytes of shared memory: what Ray asks for at least; only the data and the plan are sent around
PASSED_ON = ("M2_", "HF_", "OMP_", "MKL_")  # how the names of the variables begin that workers need

Outcome: TypeAlias = tuple[bool, list[str], Exception | None]


@contextmanager
def on_ray(work: Work, *, cpus: int = 1, gpus: float = 0) -> Iterator[_OnRay]:
    """Carry out runs on the Ray cluster that ``RAY_ADDRESS`` names, or on one of this machine alone.

    When the block ends, for whatever reason, runs that are not done save where they are and stop.

    Parameters
    ----------
    cpus : int
        Cores of each run, and its number of threads: results are those of one process with as many (``OMP_NUM_THREADS``).
    gpus : float
        GPUs of each run; with 0, it runs on the CPU.

    Raises
    ------
    UserError
        If there is no Ray, no such cluster, or a ledger that several machines cannot share.
    Stopped
        On Ctrl-C or SIGTERM, once all runs have saved.
    """
    ray = _connect(cpus, gpus)
    try:
        _check_ledger(ray, work)
        with stop_on_signal() as asked_to_stop, tqdm(bar_format="{desc}", disable=None) as line:
            hands = _OnRay(ray, work, cpus, gpus, asked_to_stop, line)
            try:
                yield hands
            finally:
                hands.stop()
    finally:
        ray.shutdown()


class _OnRay:
    """An `Executor` whose runs are tasks of a Ray cluster."""

    def __init__(self, ray: Any, work: Work, cpus: int, gpus: float, asked_to_stop: Any, line: tqdm) -> None:
        self.ray, self.work, self.asked_to_stop, self.line = ray, work, asked_to_stop, line
        self.cpus, self.gpus = cpus, gpus
        self.task = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=0)(_carry_out)
        self.sent = ray.put(replace(work, say=_nowhere, progress=False))
        self.running: dict[Any, tuple[PlannedRun, bool, float]] = {}
        self.losses: Counter[str] = Counter()

    def room(self) -> bool:
        """Whether a machine has the cores and GPUs for one more run."""
        fits = 0
        for node in self.ray.nodes():
            if node["Alive"]:
                there = node["Resources"]
                by_gpus = there.get("GPU", 0) // self.gpus if self.gpus else sys.maxsize
                fits += int(min(there.get("CPU", 0) // self.cpus, by_gpus))
        if not fits:
            raise UserError(
                f"no machine of the cluster has {self.cpus} CPUs and {self.gpus:g} GPUs for a run; "
                "give less with --cpus-per-run and --gpus-per-run"
            )
        return len(self.running) < fits

    def start(self, run: PlannedRun, whole: bool) -> None:
        """Send a run to the cluster."""
        reference = self.task.remote(self.sent, run, whole, Path.cwd(), self.cpus, self.losses[run.name])
        self.running[reference] = run, whole, time.monotonic()

    def finished(self) -> tuple[PlannedRun, bool]:
        """Wait for a run that is done, and say what its worker said; one whose worker is lost is sent again."""
        lost = (self.ray.exceptions.NodeDiedError, self.ray.exceptions.WorkerCrashedError)
        while True:
            done, _ = self.ray.wait(list(self.running), timeout=0.5)
            if self.asked_to_stop():
                raise Stopped("stopped, and every run was saved where it stood; --resume goes on from there")
            self._show()
            for reference in done:
                run, whole, _ = self.running.pop(reference)
                try:
                    worked, said, failure = self.ray.get(reference)
                except (*lost, self.ray.exceptions.OutOfMemoryError) as error:
                    self._send_again(run, whole, type(error).__name__)
                    continue
                self.line.clear()
                for text in said:
                    self.work.say(text)
                if failure:
                    raise failure
                return run, worked

    def _send_again(self, run: PlannedRun, whole: bool, reason: str) -> None:
        self.losses[run.name] += 1
        if self.losses[run.name] > LOSSES:
            raise UserError(f"{run.name}: lost {LOSSES + 1} workers ({reason}); look at the machines, then --resume")
        self.line.clear()
        self.work.say(f"{run.name}: its worker was lost ({reason}); it goes on from its last save")
        self.start(run, whole)

    def _show(self) -> None:
        now = time.monotonic()
        names = [f"{run.name} ({(now - since) / 60:.0f} min)" for run, _, since in self.running.values()]
        self.line.set_description_str(f"{len(names)} running: {', '.join(names)}")

    def stop(self) -> None:
        """Let the runs that are not done save where they are, and wait for that."""
        for reference in self.running:
            self.ray.cancel(reference, force=False)  # arrives as Ctrl-C would
        if self.running:
            self.ray.wait(list(self.running), num_returns=len(self.running))


def _carry_out(work: Work, run: PlannedRun, whole: bool, place: Path, threads: int, losses: int) -> Outcome:
    """What a worker does: a run, from where it stands; returns whether there was anything to do, what it said, and what failed."""
    said: list[str] = []
    torch.set_num_threads(threads)
    try:
        if not place.is_dir():
            raise UserError(f"{place}: not on {os.uname().nodename}; the machines of a cluster need one disk in common")
        os.chdir(place)  # the folders of a plan may be relative to it
        if losses:
            _take_over(work.folder / run.name)
        work = replace(work, say=said.append, resume=work.resume or losses > 0)
        return work.carry_out(run, whole), said, None
    except (UserError, OSError) as error:
        return False, said, error


def _take_over(folder: Path) -> None:
    """Wait until a lost worker no longer holds a folder. One of another machine is taken at Ray's word."""
    until = time.monotonic() + GRACE
    while time.monotonic() < until:
        with suppress(UserError), sole_writer(folder):
            return
        time.sleep(0.5)
    (folder / LOCK_NAME).unlink(missing_ok=True)


def _connect(cpus: int, gpus: float) -> Any:
    """Ray, connected; what its workers need to know is in their environment."""
    address = os.environ.get("RAY_ADDRESS", "local")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # nothing is told to anyone
    if address == "local":  # nor is this machine opened to others: Ray listens to it alone, and wants a secret
        os.environ |= {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_AUTH_MODE": "token"}
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # one a process: Ray reads it once
    try:
        import ray
        import ray.exceptions
    except ImportError:
        raise UserError("--cluster ray needs Ray; pip install 'm2helpers[cluster]'") from None
    variables = {name: value for name, value in os.environ.items() if name.startswith(PASSED_ON)}
    variables |= {name: str(cpus) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    root = str(Path(__file__).resolve().parents[2])
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    if not gpus:
        variables["M2_DEVICE"] = "cpu"
    options: dict[str, Any] = dict(runtime_env={"env_vars": variables}, log_to_driver=False, logging_level="ERROR")
    if address == "local":
        options |= dict(include_dashboard=False, object_store_memory=STORE)
    try:
        ray.init(address, **options)
    except Exception as error:  # Ray knows no kinds of these
        reason = str(error).partition("\n")[0]
        raise UserError(f"Ray does not start, or answer, at {address} ({reason}); see the page on clusters") from None
    return ray


def _check_ledger(ray: Any, work: Work) -> None:
    """Refuse a ledger in a file where there are several machines: each would have its own."""
    machines = {node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    where = str(work.ledger.where if work.ledger else os.environ.get("M2_LEDGER", ""))
    if len(machines) > 1 and "://" not in where:
        raise UserError(
            f"{len(machines)} machines cannot share a ledger in a file; set M2_LEDGER to postgresql://user@host/database"
        )


def _nowhere(text: str) -> None:
    pass
