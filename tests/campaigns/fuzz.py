"""Thousands of inputs that nobody checked, through every reader. Each must end in a result that holds, or in one clear line
and status 1 or 2: no traceback, no hang, no memory without end, nothing half written, no network, no code of the input run.

python -m tests.campaigns.fuzz [COUNT] [--only READER] [--seed N] [--record]

COUNT is 10,000 by default, over all readers; --record writes the counts to docs/trust.json. `tests/test_trust.py` runs it briefly.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import chdir, contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from unittest.mock import patch

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import pandas as pd
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from tests.campaigns import inputs
from tests.campaigns.inputs import Case

SHARES = {
    "hdf5": 0.08, "ledger": 0.06, "resume": 0.05, "adapter": 0.12, "model": 0.1, "run": 0.08, "jsonl": 0.15, "parquet": 0.1, "command": 0.04, "csv": 0.22,
}  # fmt: skip
SECONDS, MEMORY = 60, 4 << 30
FORBIDDEN = (
    "socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn",
    "pickle.find_class", "sqlite3.load_extension",
)  # fmt: skip
_BAR = re.compile(r"\d+%\|| \? ?\S*it/s|\d+it \[|it/s\]|step/s|series/s")


class TooLong(BaseException):
    """An input took more than `SECONDS`: no handler of errors catches it."""


class Guard:
    """Notes what an input must not do. An audit hook cannot be taken back, so it is switched."""

    def __init__(self) -> None:
        self.on, self.folder, self.seen = False, "", list[str]()
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple) -> None:
        if not self.on:
            return
        if event in FORBIDDEN:
            self.seen.append(f"{event} {arguments!r:.200}")
        elif event == "exec" and self.folder in getattr(arguments[0], "co_filename", ""):
            self.seen.append(f"{event} {arguments[0].co_filename}")

    @contextmanager
    def watching(self, folder: Path) -> Iterator[None]:
        self.folder, self.seen, self.on = str(folder), [], True
        try:
            yield
        finally:
            self.on = False


# ---------------------------------------------------------------- one input


def attempt(case: Case, folder: Path, guard: Guard) -> str:
    """Run one command line on one input; return how it ended: done, refused or usage.

    Raises
    ------
    AssertionError
        If it ended in any other way.
    """
    from m2helpers.__main__ import main

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    words = inputs.lay(case, folder)
    (folder / "cwd").mkdir()  # where a relative name goes
    before = _listing(folder)
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", errors="backslashreplace") for _ in range(2))
    environment = {name: value.replace(inputs.HERE, str(folder)) for name, value in case.environment.items()}
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        with (
            patch.dict(os.environ, environment),
            redirect_stdout(out),
            redirect_stderr(err),
            chdir(folder / "cwd"),
            guard.watching(folder),
        ):
            try:
                status: object = main(words)
            except SystemExit as ended:
                status = ended.code
    except (Exception, TooLong) as error:
        raise AssertionError(f"{words}: {''.join(traceback.format_exception(error))[-1500:]}") from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    for stream in (out, err):
        stream.flush()
    said = err.buffer.getvalue().decode().replace("\r", "\n")  # type: ignore[attr-defined]
    _check_said(words, status, said)
    assert not guard.seen, f"{words}: {guard.seen[:3]}"
    after = _listing(folder)
    may = (*case.outputs, *case.changes, "cwd/")
    strange = {name for name in before | after if before.get(name) != after.get(name) and not name.startswith(may)}
    assert not strange, f"{words}: changed {sorted(strange)}"
    assert not any(name.endswith(".part") for name in after), f"{words}: left {sorted(after)}"
    if status and said.rstrip().endswith("the work began"):  # in whose place stands nothing
        return "done"
    if status:
        left = (
            {name for name in after if name.startswith(case.outputs) and before.get(name) != after[name]}
            if case.outputs
            else set()
        )
        assert not left, f"{words}: failed and left {left}"
        return "usage" if status == 2 else "refused"
    try:
        check(case, folder)
    except (AssertionError, OSError, ValueError, LookupError, TypeError) as error:
        raise AssertionError(f"{words}: {error!r} in its result") from None
    return "done"


def _check_said(words: list[str], status: object, said: str) -> None:
    assert status in (0, 1, 2), f"{words}: status {status!r}"
    assert "Traceback" not in said, f"{words}: {said[-1500:]}"
    if status == 2:
        assert said.strip(), f"{words}: wrong usage, and nothing said"
        return
    lines = [line for line in said.splitlines() if line.strip() and not _BAR.search(line)]
    strange = [
        line for line in lines if not line.startswith("m2helpers ") or len(line) > 3000 or not line.isprintable()
    ]
    assert not strange, f"{words}: said {strange[0]!r:.500}"
    assert "not enough memory" not in said, f"{words}: {said[-500:]}"
    if status:
        assert lines and len(set(lines)) == len(lines), f"{words}: said {lines}"


def _listing(folder: Path) -> dict[str, object]:
    """Every file by name, with what is in it."""
    found: dict[str, object] = {}
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() or not path.is_file():
            found[name if not path.is_dir() or path.is_symlink() else f"{name}/"] = path.lstat().st_mode
        else:
            found[name] = path.read_bytes()
    return {name: content for name, content in found.items() if not name.endswith("/")}


def check(case: Case, folder: Path) -> None:
    """Whether what was written is what it ought to be."""
    command, written = case.words[0], {name: folder / name for name in case.outputs if (folder / name).is_file()}
    if command in ("forecast", "backtest") and "out.csv" in written and isinstance(case.expected, int):
        frame = pd.read_csv(folder / "out.csv")
        assert len(frame), "an empty forecast"
        numbers = frame.select_dtypes("number").to_numpy()
        assert not np.isinf(numbers).any(), "an infinite forecast"
        if (
            command == "forecast"
            and case.words[1].endswith("own.csv")
            and "own.csv" in case.files
            and case.files["own.csv"] == inputs._SERIES
        ):
            assert len(frame) == case.expected and np.isfinite(numbers).all() and {"a", "b"} <= set(frame), (
                frame.to_string()
            )
    elif command == "encode" and "text/train.txt" in written:
        about = json.loads((folder / "text" / "settings.json").read_text())
        for split in ("train", "validation", "test"):
            lines = (folder / "text" / f"{split}.txt").read_text().splitlines()
            assert lines and all(re.fullmatch(r"[\d.,;]+", line) for line in lines)
        assert about["scale"] > 0 and np.isfinite(about["scale"])
    elif command == "ledger" and "out.json" in written:
        report = json.loads((folder / "out.json").read_text())
        assert report["spent"] == sum(entry["flops"] for entry in report["entries"]) >= 0
        assert all(isinstance(entry["flops"], int) and entry["flops"] >= 0 for entry in report["entries"])
    elif command == "export":
        made = [path.relative_to(folder).as_posix() for path in folder.rglob("model.safetensors")]
        assert set(made) - set(case.files), "nothing exported"


# ---------------------------------------------------------------- what is read with


class Bench:
    """Good files, made once, and a small model in place of the large ones."""

    def __init__(self, folder: Path) -> None:
        from m2helpers import models
        from m2helpers.data import load_dataset
        from m2helpers.experiments.planning import plan_of
        from m2helpers.flops.costs import Cost
        from m2helpers.ledger import Ledger, Spender
        from m2helpers.models import load_base
        from m2helpers.training import train_lora
        from tests.campaigns.resume import make_inputs

        os.environ["M2_LEDGER"] = str(folder / "spent.sqlite")
        make_inputs(folder)
        self.folder, self.model = folder, str(folder / "base")
        brief = dict(lora_r=2, batch_size=2, max_steps=4, save_steps=2, eval_steps=2, eval_windows=2, max_length=48)
        settings_ = replace(plan_of(self.model).initial, **brief)  # as `train` has them
        dataset = load_dataset(folder / "data.h5")
        train_lora(load_base(self.model), dataset, settings_, folder / "run", progress=False)
        self.good = {
            "model": _files(folder / "base"),
            "run": _files(folder / "run"),
            "data": {"": str(folder / "data.h5").encode()},
        }
        # `config.json` of a run makes a folder a run
        self.good["adapter"] = {name: data for name, data in self.good["run"].items() if name.startswith("adapter")}
        self.good["resume"] = self._stopped(dataset, settings_)
        ledger = Ledger(folder / "good.sqlite")
        for number in range(3):
            with ledger.reserve(Spender(f"run-{number}", "initial"), train=Cost(1, 10, 10)) as bill:
                bill.add("train", Cost(1, 5, 5))
        self.ledger = (folder / "good.sqlite").read_bytes()
        cached = models.load_base(self.model)
        self._load = models.load_base

        def load(name: str | None = None, **options: object) -> object:
            return cached if name in (None, "embedded", self.model) and not options else self._load(name, **options)  # type: ignore[arg-type]

        self.load = load

    def _stopped(self, dataset: object, settings_: object) -> dict[str, bytes]:
        """A run of the same that was stopped half-way."""
        from m2helpers.training import run as training

        def stop(folder: Path, *_: object, **__: object) -> None:
            real(folder, *_, **__)
            if _[2].step == 2:  # type: ignore[attr-defined]
                raise KeyboardInterrupt

        real, place = training.save_state, self.folder / "resume"
        with patch.object(training, "save_state", stop), suppress(KeyboardInterrupt):
            training.train_lora(training_base(self.model), dataset, settings_, place, stage="initial", progress=False)  # type: ignore[arg-type]
        return _files(place)

    def strategy(self, reader: str) -> st.SearchStrategy[Case]:
        """The inputs of a reader."""
        match reader:
            case "csv":
                return inputs.csv_cases()
            case "parquet":
                return inputs.parquet_cases()
            case "hdf5":
                return inputs.hdf5_cases()
            case "jsonl":
                return inputs.jsonl_cases()
            case "ledger":
                return inputs.ledger_cases(self.ledger, self.model, self.folder)
            case "command":
                return inputs.command_cases(_flags())
        return inputs.folder_cases(self.good, reader, self.model)

    @contextmanager
    def small(self, reader: str) -> Iterator[None]:
        """Commands load the small base at once, and do not begin what takes hours."""
        from m2helpers.cli.parser import parse
        from m2helpers.files import UserError

        def reached(*_: object, **__: object) -> None:
            raise UserError("the work began")

        def tune(base: object, rows: dict, settings_: object, *_: object, **__: object) -> None:
            from m2helpers.instruct.rows import tokenise_rows

            for part, some in rows.items():
                tokenise_rows(some, base.tokenizer, settings_.max_length, part)  # type: ignore[attr-defined]
            raise UserError("the work began")

        patches = [patch("m2helpers.models.load_base", self.load), patch("m2helpers.instruct.tuning.tune", tune)]
        patches.append(patch("m2helpers.instruct.quantised.load_for_tuning", lambda *_: self.load()))
        if reader == "command":
            long = [
                "training.run.train_lora",
                "pretraining.run.pretrain",
                "experiments.runner.run_plan",
                "evaluation.measure.evaluate",
                "evaluation.measure.calibrate",
            ]
            long += [
                "evaluation.floor.floor",
                "experiments.bench.run_benchmark",
                "experiments.classic.compare_classics",
                "report.pages.fill_pages",
                "simulator.law_of",
            ]
            patches += [patch(f"m2helpers.{name}", reached) for name in long]
        else:  # few lines differ there, and reading one takes longer than what it says
            parsed = cache(lambda words: parse(list(words)))
            patches.append(patch("m2helpers.__main__.parse", lambda words: parsed(tuple(words))))
        if reader in ("run", "resume", "model"):
            patches = patches[1:] if reader != "resume" else patches
        for each in patches:
            each.start()
        try:
            yield
        finally:
            for each in patches:
                each.stop()


def training_base(model: str) -> object:
    """A base of its own, since training changes it."""
    from m2helpers.models import load_base

    return load_base(model)


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def _flags() -> dict[str, list[str]]:
    """The flags of every command, as its help has them."""
    from m2helpers.cli.parser import COMMANDS, parse

    found = {}
    for name in COMMANDS:
        with redirect_stdout(io.StringIO()) as text, suppress(SystemExit):
            parse([name, "--help"])
        found[name] = sorted(set(re.findall(r"(?<!\w)--[a-z][a-z-]+", text.getvalue())) - {"--help"})
    return found


# ---------------------------------------------------------------- many inputs


def run(
    readers: dict[str, int],
    seed_: int,
    note: Callable[[str], None] = lambda text: None,
    keep: Callable[[str, dict[str, int]], None] = lambda reader, counts: None,
) -> dict[str, dict[str, int]]:
    """So many inputs through each reader; return how they ended, and `keep` it of each that is done without a failure."""
    import m2helpers.__main__
    import m2helpers.evaluation.heldback
    import m2helpers.forecasting
    import m2helpers.instruct.tuning
    import m2helpers.runs  # noqa: F401 (so that nothing is imported while a guard watches)

    def late(*_: object) -> None:
        raise TooLong(f"over {SECONDS} s")

    signal.signal(signal.SIGALRM, late)
    guard, ended, failures = Guard(), dict[str, dict[str, int]](), dict[str, str]()
    shared = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory(dir=shared, prefix="m2-fuzz-") as name:
        bench, place = Bench(Path(name)), Path(name) / "case"
        limit = int(re.search(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text()).group(1)) * 1024 + MEMORY  # type: ignore[union-attr]
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        for reader, count in readers.items():
            counts, started = Counter[str](), time.monotonic()

            @seed(seed_)
            @settings(
                max_examples=count,
                deadline=None,
                database=None,
                suppress_health_check=list(HealthCheck),
                phases=[Phase.generate],
            )
            @given(bench.strategy(reader))
            def each(case: Case) -> None:
                (Path(name) / "last").write_text(repr(case)[:100_000])
                try:
                    counts[attempt(case, place, guard)] += 1  # noqa: B023
                except AssertionError as error:  # one of each kind is shown at the end
                    kind = re.sub(r"\d+|'[^']*'", "", (str(error).strip() or "no word").splitlines()[-1])[:150]
                    counts["failed"] += 1  # noqa: B023
                    note(f"{reader}: {kind}") if kind not in failures else None  # noqa: B023
                    failures.setdefault(kind, f"{error}\n    {case!r:.3000}")

            with bench.small(reader):
                each()
            ended[reader] = {how: count for how, count in counts.items() if count}
            if not counts["failed"]:
                keep(reader, ended[reader])
            note(f"{reader}: {dict(counts)}, {time.monotonic() - started:.0f} s")
        assert not failures, f"{len(failures)} kinds of failure\n\n" + "\n\n".join(failures.values())
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        assert peak < MEMORY, f"{peak / 1e9:.1f} GB of memory"
    return ended


def main() -> int:
    """Run it, and record what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("count", nargs="?", type=int, default=10_000)
    parser.add_argument("--only", choices=SHARES, nargs="+")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", action="store_true")
    given_ = parser.parse_args()
    shares = {reader: SHARES[reader] for reader in given_.only or SHARES}
    counts = {reader: round(given_.count * share) for reader, share in shares.items()}

    def keep(reader: str, counts: dict[str, int]) -> None:
        from tests.campaigns.record import known, record

        if given_.record:
            before = known("fuzz").get("ended", {}) if known("fuzz").get("seed") == given_.seed else {}
            record("fuzz", {"seed": given_.seed, "ended": before | {reader: counts}})

    ended = run(counts, given_.seed, lambda text: print(text, file=sys.stderr, flush=True), keep)
    print(json.dumps(ended))
    return 0


if __name__ == "__main__":
    sys.exit(main())
