"""What can go wrong under a command, made to go wrong: the disk fills up, a folder is taken away, signals come, memory runs out.

Whatever comes, a command ends by itself with one line that names cause and remedy (or dies of a signal that nothing can answer);
what it had saved stays, and done again it ends with the same bytes as one that was left alone.

python -m tests.campaigns.faults [MOMENTS] [--only WORK] [--record]

MOMENTS, 100 by default, are those at which a signal comes to each work at random; the others come at every write. Linux; as
root also real disks. `tests/test_trust.py` runs it briefly; kills outright are `tests/campaigns/resume.py`'s.
"""

from __future__ import annotations

import argparse
import errno
import io
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import safe_open

from m2helpers.engine.resume import STATE_NAME, has_state
from m2helpers.files import clear_half_written
from tests.campaigns import resume as kills
from tests.campaigns.resume import TINY, TRAIN, make_inputs

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(
    ["m2helpers.__main__", "tools.notebooks", "m2helpers.training.run", "m2helpers.pretraining.run", "m2helpers.experiments.runner", "m2helpers.instruct.tuning", "m2helpers.forecasting"]
)  # fmt: skip
LONGEST = 180  # seconds that one run may take beside other work
ROW = {"instruction": "Next?", "input": "1;2;", "output": "3"}


# ---------------------------------------------------------------- the works


def _command(words: str) -> int:
    from m2helpers.__main__ import main

    return main(words.split())


def _call(name: str, work: Callable[[], object]) -> int:
    """Something as a command does it, failures and all."""
    from m2helpers.__main__ import _run

    return _run(name, work)  # type: ignore[arg-type]


def _train(inputs: Path, folder: Path) -> int:
    from m2helpers.data import load_dataset
    from m2helpers.models import load_base
    from m2helpers.training import train_lora

    def work() -> None:
        dataset = load_dataset(inputs / "data.h5")
        train_lora(load_base(str(inputs / "base")), dataset, TRAIN, folder, resume=has_state(folder), progress=False)

    return _call("train", work)


def _pretrain(inputs: Path, folder: Path) -> int:
    from m2helpers.pretraining import batches, synthetic
    from m2helpers.pretraining import run as pretraining

    few = {name: pretraining.FAMILIES[name] for name in ("glycolysis", "schnakenberg")}
    pretraining.FAMILIES = batches.FAMILIES = synthetic.FAMILIES = few
    batches.BLOCK = 8
    again = has_state(folder)
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        work = partial(pretraining.pretrain, kills.PRETRAIN, folder, resume=again, architecture=TINY)
        return _call("pretrain", work)


def _instruct(inputs: Path, folder: Path) -> int:
    rows, again = inputs / "rows.jsonl", "--resume" if any(folder.glob("checkpoint-*/trainer_state.json")) else ""
    flags = "--four-bit 0 --epochs 2 --lora-r 2 --max-length 96 --learning-rate 0.01 --answers 1"
    return _command(
        f"instruct --train {rows} --val {rows} --model {inputs / 'base'} --output-dir {folder} {flags} {again}"
    )


def _experiments(inputs: Path, folder: Path) -> int:
    from m2helpers.data import load_dataset
    from m2helpers.evaluation.measure import evaluate
    from m2helpers.experiments import runner
    from m2helpers.experiments.planning import Plan

    runner.evaluate = partial(evaluate, contexts=[64])  # the series are too short for the protocols as they are
    runner.PROTOCOLS, runner.P5_CONTEXTS = ("P5",), (64,)  # type: ignore[assignment]
    first = replace(TRAIN, max_steps=4, save_steps=2)
    plan = Plan(
        first,
        replace(first, learning_rate=1e-3),
        learning_rates=(1e-3, 1e-2),
        ranks=(2,),
        contexts=(48,),
        precisions=(2,),
        sweep_steps=2,
    )
    stages = ("untrained", "initial", "precision")

    def work() -> None:
        runner.run_plan(
            plan,
            str(inputs / "base"),
            load_dataset(inputs / "data.h5"),
            folder,
            stages=stages,
            resume=True,
            say=lambda text: None,
        )

    return _call("experiments", work)


def _forecast(inputs: Path, folder: Path) -> int:
    flags = "--steps 2 --constrained --samples 2 --levels 0.1,0.9"
    return _command(
        f"forecast {inputs / 'own.csv'} --model {inputs / 'base'} --out {folder / 'out.csv'} --plot {folder / 'out.png'} {flags}"
    )


def _ledger(inputs: Path, folder: Path) -> int:
    return _command(f"ledger --model {inputs / 'base'} --json {folder / 'ledger.json'} --csv {folder / 'ledger.csv'}")


def _notebook(inputs: Path, folder: Path) -> int:
    from tools import notebooks

    return notebooks.main(["--output-dir", str(folder), str(inputs / "1_small.ipynb")])


WORKS = {"train": _train, "pretrain": _pretrain, "instruct": _instruct, "experiments": _experiments, "forecast": _forecast, "ledger": _ledger, "notebook": _notebook}  # fmt: skip
LONG = ("train", "pretrain", "instruct", "experiments")
"""Works that save as they go."""


def prepare(folder: Path) -> None:
    """What the works read."""
    import nbformat

    from m2helpers.flops.costs import Cost
    from m2helpers.ledger import Ledger, Spender

    make_inputs(folder)
    (folder / "own.csv").write_text("a,b\n" + "".join(f"{i % 5 + 1}.5,{i % 3 + 1}.25\n" for i in range(12)))
    (folder / "rows.jsonl").write_text(4 * (json.dumps(ROW) + "\n"))
    nbformat.write(
        nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 + 1", id="one")]), folder / "1_small.ipynb"
    )
    ledger = Ledger(folder / "good.sqlite")
    with ledger.reserve(Spender("run", "initial"), train=Cost(1, 10, 10)) as bill:
        bill.add("train", Cost(1, 5, 5))


# ---------------------------------------------------------------- the faults


@dataclass(frozen=True)
class Fault:
    """What goes wrong, and when."""

    kind: str
    """A number of `errno` by name, a signal by name, or one of removed, clock, memory, file-size, full, read-only, denied."""
    at: int = 0
    """Before which write it comes; 0: from the start, or `after`."""
    after: float = 0.0
    """Seconds."""


NONE = Fault("none")
ERRORS = ("ENOSPC", "EROFS", "EACCES", "EDQUOT", "EIO")
SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGKILL")


def _counting(fault: Fault, folder: Path, writes: list[int]) -> Callable[[], None]:
    """Called before each write: counts, and lets the fault come at its own."""
    done = False

    def count() -> None:
        nonlocal done
        writes[0] += 1
        if writes[0] != fault.at and not (done and fault.kind in ERRORS):  # a full disk stays full
            return
        done = True
        if fault.kind in ERRORS:
            number = getattr(errno, fault.kind)
            raise OSError(number, os.strerror(number), str(folder))
        if fault.kind in SIGNALS:
            os.kill(os.getpid(), getattr(signal, fault.kind))
        elif fault.kind == "removed":
            shutil.rmtree(folder, ignore_errors=True)
        elif fault.kind == "clock":
            real = time.time
            time.time = lambda: real() - 40 * 86400
        elif fault.kind == "memory":
            raise MemoryError

    return count


def _child(name: str, inputs: str, folder: str, fault: Fault, tell: Any) -> None:
    """One run in a process of its own, its writes counted, what it says kept."""
    import torch
    import transformers.modeling_utils

    from m2helpers import lora
    from m2helpers.engine import resume

    torch.set_num_threads(1)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup has it ignored
    signal.signal(signal.SIGINT, signal.default_int_handler)  # and a shell, of what it runs in the background
    place = Path(folder)
    os.environ["M2_LEDGER"] = f"{folder}.sqlite"
    os.environ["HF_HUB_OFFLINE"] = "1"
    if name == "ledger":
        os.environ["M2_LEDGER"] = str(Path(inputs) / "good.sqlite")
    writes, said = [0], io.StringIO()
    count = _counting(fault, place, writes)

    def counted(write: Callable) -> Callable:
        def counting(*args: Any, **options: Any) -> Any:
            count()
            return write(*args, **options)

        return counting

    for each in ("fsync", "replace"):
        setattr(os, each, counted(getattr(os, each)))
    for module, each in ((lora, "save_file"), (resume, "save_file"), (transformers.modeling_utils, "safe_save_file")):
        setattr(module, each, counted(getattr(module, each)))
    if fault.kind == "file-size":
        resource.setrlimit(resource.RLIMIT_FSIZE, (fault.at, fault.at))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    if fault.kind == "address-space":
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + fault.at, taken + fault.at))
    if fault.kind == "denied":
        os.setgid(65534)
        os.setuid(65534)
    with redirect_stdout(said), redirect_stderr(said):
        try:
            status = WORKS[name](Path(inputs), place)
        except SystemExit as ended:
            status = int(ended.code or 0)
        except BaseException:
            import traceback

            traceback.print_exc()
            status = 99
    tell.send((writes[0], said.getvalue()[-20_000:]))  # through a pipe, which no limit on files holds up
    os._exit(status)


def run(name: str, inputs: Path, folder: Path, fault: Fault = NONE) -> tuple[int, int, str]:
    """One process; its exit code (negative: the signal that it died of), its writes, and what it said."""
    listen, tell = processes.Pipe(duplex=False)
    process = processes.Process(target=_child, args=(name, str(inputs), str(folder), fault, tell))
    process.start()
    tell.close()
    if fault.after and fault.kind in SIGNALS:
        process.join(fault.after)
        with suppress(ProcessLookupError):  # it has just ended
            os.kill(process.pid, getattr(signal, fault.kind))
    process.join(LONGEST)
    if process.is_alive():
        process.kill()
        process.join()
        raise AssertionError(f"{name}, {fault}: still there after {LONGEST} s")
    try:
        writes, said = listen.recv()
    except EOFError:  # killed
        writes, said = 0, ""
    return process.exitcode, writes, said


def _result(folder: Path) -> dict[str, object]:
    """What must not depend on a fault: every file below, timings and the place left out."""
    found: dict[str, object] = {}
    for part in [folder, *sorted(path for path in folder.rglob("*") if path.is_dir() and path.name != "logs")]:
        for name, content in kills.result(part).items():
            kept = content.replace(str(folder), "") if isinstance(content, str) else content
            found[f"{part.relative_to(folder)}/{name}"] = kept
    return found


def _saved_step(folder: Path) -> int:
    """The step that the last save of a run stands at; -1 without one."""
    try:
        with safe_open(folder / STATE_NAME, framework="pt") as stream:
            return json.loads(stream.metadata()["about"])["record"]["step"]
    except (OSError, KeyError, TypeError, ValueError, RuntimeError):
        return -1


def judge(name: str, fault: Fault, code: int, said: str, folder: Path) -> str:
    """How a run that met a fault ended: done, refused or killed.

    Raises
    ------
    AssertionError
        If it ended otherwise, or with more than one line, or with one that does not say what to do.
    """
    what = f"{name}, {fault}: {code}, said {said[-1500:]}"
    assert code in (0, 1) or (fault.kind in SIGNALS and code == -getattr(signal, fault.kind)), what
    assert "Traceback" not in said, what
    assert not list(folder.rglob("*.part")) or code < 0 or fault.kind in ("removed", "read-only", "denied"), (
        f"{what}: {list(folder.rglob('*.part'))}"
    )
    if code == 0:
        return "done"
    if code < 0:
        return "killed"
    begins = "error: " if name == "notebook" else f"m2helpers {name}: "
    lines = [line for line in said.replace("\r", "\n").splitlines() if line.startswith(begins)]
    assert lines and any(mark in lines[-1] for mark in (";", "--resume")), what
    if fault.kind in ERRORS:
        assert os.strerror(getattr(errno, fault.kind)) in lines[-1], what
    return "refused"


# ---------------------------------------------------------------- the campaign


class Campaign:
    """One work, and the faults that it has met."""

    def __init__(self, name: str, inputs: Path, seed: int = 0) -> None:
        self.name, self.inputs, self.draw = name, inputs, random.Random(seed)
        place, self.writes, _ = self._alone("whole")
        self.expected = _result(place)
        self.number, self.met = 0, Counter[str]()

    def _alone(self, turn: str) -> tuple[Path, int, float]:
        """A run that is left alone: its folder, its writes, and its seconds."""
        place, began = self.inputs / self.name / turn / "run", time.monotonic()
        place.parent.mkdir(parents=True)
        code, writes, said = run(self.name, self.inputs, place)
        assert code == 0, said
        return place, writes, time.monotonic() - began

    def meet(self, fault: Fault, where: Path | None = None, mend: Callable[[Path], None] = lambda place: None) -> None:
        """Run into a fault, judge how it ended, mend the fault, and run to the end."""
        self.number += 1
        place = (where or self.inputs / self.name / str(self.number)) / "run"  # the folder's name is part of its card
        place.parent.mkdir(parents=True, exist_ok=True)
        code, _, said = run(self.name, self.inputs, place, fault)
        ended = judge(self.name, fault, code, said, place)
        self.met[f"{fault.kind}: {ended}"] += 1
        saved = _saved_step(place)
        if code == -signal.SIGKILL and self.name not in LONG:  # nobody comes after it who would own the folder
            clear_half_written(place)
        mend(place)
        assert _saved_step(place) >= saved
        if ended != "done":
            code, _, said = run(self.name, self.inputs, place)
            if code == 1 and "holds a finished run" in said:
                code = 0  # it came after the last file was written
            assert code == 0, f"{self.name}, again after {fault}: {said[-1500:]}"
        found = _result(place)
        other = [name for name in {**found, **self.expected} if found.get(name) != self.expected.get(name)]
        shown = [(name, str(found.get(name))[-300:], str(self.expected.get(name))[-300:]) for name in other]
        assert not other, f"{self.name}, {fault}: other bytes than when left alone: {shown}"
        if where is None:
            shutil.rmtree(place.parent)

    def at_writes(self, kinds: tuple[str, ...], every: int = 1) -> None:
        """Each fault before each write, or each `every`-th."""
        for kind in kinds:
            for at in range(1, self.writes + 1, every):
                self.meet(Fault(kind, at=at))

    def at_random(self, kinds: tuple[str, ...], moments: int) -> None:
        """At so many random moments a signal, each in its turn."""
        _, _, seconds = self._alone("warm")  # the first of all runs had to import what the others have
        for number in range(moments):
            self.meet(Fault(kinds[number % len(kinds)], after=max(0.05, self.draw.random() * seconds)))

    def real(self) -> None:
        """Real limits and, as root, real disks."""
        for size in (100, 2_000, 20_000):
            self.meet(Fault("file-size", at=size))
        self.meet(Fault("address-space", at=64 << 20))
        if hasattr(os, "geteuid") and os.geteuid() == 0:
            with _disk(self.inputs / "disk", "64k") as disk:
                if disk:
                    self.meet(Fault("full"), where=disk, mend=lambda place: _mount("remount,size=64m", disk))
            with _disk(self.inputs / "disk", "64m") as disk:
                if disk:
                    _mount("remount,ro", disk)
                    self.meet(Fault("read-only"), where=disk, mend=lambda place: _mount("remount,rw", disk))
            shut = self.inputs / "shut"
            shut.mkdir(mode=0o755, exist_ok=True)
            self.meet(Fault("denied"), where=shut)
            shutil.rmtree(shut)


def _mount(options: str, place: Path) -> bool:
    return (
        subprocess.run(
            ["mount", "-o", options, "-t", "tmpfs", "tmpfs", place], capture_output=True, check=False
        ).returncode
        == 0
    )


@contextmanager
def _disk(place: Path, size: str) -> Iterator[Path | None]:
    """A small disk of its own in memory; None where none can be had."""
    place.mkdir(exist_ok=True)
    if not _mount(f"size={size}", place):
        yield None
        return
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", place], check=False)


def main() -> int:
    """Every work through every fault, and a record of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("moments", nargs="?", type=int, default=100)
    parser.add_argument("--only", choices=WORKS, nargs="+")
    parser.add_argument("--every", type=int, default=1, help="each how many writes")
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="m2-faults-") as folder:
        inputs = Path(folder)
        inputs.chmod(0o755)  # another user reads it too
        prepare(inputs)
        for name in options.only or WORKS:
            began, campaign = time.monotonic(), Campaign(name, inputs)
            campaign.real()
            campaign.at_writes((*ERRORS[:3], "removed", "clock", "memory", *SIGNALS[:3]), options.every)
            campaign.at_random(SIGNALS, options.moments)
            how = {"writes": campaign.writes, "every": options.every, "moments": options.moments}
            found = {**how, "met": dict(sorted(campaign.met.items()))}
            print(f"{name}: {found}, {time.monotonic() - began:.0f} s", flush=True)
            if options.record:
                from tests.campaigns.record import known, record

                record("faults", {"works": known("faults").get("works", {}) | {name: found}})
    return 0


if __name__ == "__main__":
    sys.exit(main())
