"""Runs of fine-tuning and of pre-training, killed while they train or save, resumed, and held against one that was left alone.

Briefly run by `tests/engine/test_loop.py`, and at length by hand:

python tests/campaigns/resume.py [KILLS]     (at every write boundary, then KILLS times, 50 by default, at random moments)
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pandas as pd
import torch
import transformers.modeling_utils
from transformers import Qwen2ForCausalLM

from m2helpers import lora
from m2helpers.data import load_dataset
from m2helpers.engine import resume
from m2helpers.engine.resume import has_state
from m2helpers.models import embedded_config, embedded_tokenizer, load_base
from m2helpers.pretraining import batches, synthetic
from m2helpers.pretraining import run as pretraining
from m2helpers.settings import PretrainSettings, TrainSettings
from m2helpers.simulator import SimulatorSettings, simulate, write_dataset
from m2helpers.training import train_lora

TINY = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
TRAIN = TrainSettings(
    lora_r=2, learning_rate=1e-2, batch_size=3, max_steps=7, max_length=48, eval_steps=2, save_steps=3, eval_windows=5,
    average=0.9, rescale=0.5, random_start=1,  # everything that a state or a window depends on
)  # fmt: skip
PRETRAIN = PretrainSettings(
    tokens=5 * 2 * 32, batch_size=2, max_length=32, warmup_steps=2, log_steps=3, eval_steps=3, eval_texts=2,
    save_steps=2,  # so that some saves fall between two rows of the history
)  # fmt: skip
processes = multiprocessing.get_context("forkserver")
# Its own module cannot be among them: the server of Python 3.11 does not know the paths of this process.
processes.set_forkserver_preload(
    [
        "m2helpers.training.run",
        "m2helpers.pretraining.run",
        "m2helpers.data",
        "transformers.models.qwen2.modeling_qwen2",
    ]
)


def make_inputs(folder: Path) -> None:
    """A tiny base with random weights, and a few simulated series."""
    torch.manual_seed(0)
    Qwen2ForCausalLM(embedded_config(**TINY)).save_pretrained(folder / "base")
    embedded_tokenizer().save_pretrained(folder / "base")
    settings = SimulatorSettings(systems=12, steps=20, t_max=40.0)
    time_points, trajectories, _ = simulate(settings)
    write_dataset(folder / "data.h5", time_points, trajectories, settings)


def train(inputs: Path, folder: Path) -> None:
    """Fine-tune, or resume."""
    os.environ["M2_LEDGER"] = str(folder.with_suffix(".sqlite"))
    base, dataset = load_base(str(inputs / "base")), load_dataset(inputs / "data.h5")
    train_lora(base, dataset, TRAIN, folder, resume=has_state(folder), progress=False)


def pretrain(inputs: Path, folder: Path) -> None:
    """Pre-train, or resume, on two families, drawn in blocks so small that a run reads two of them."""
    few = {name: pretraining.FAMILIES[name] for name in ("glycolysis", "schnakenberg")}
    pretraining.FAMILIES = batches.FAMILIES = synthetic.FAMILIES = few
    batches.BLOCK = 8
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):  # its bar
        pretraining.pretrain(PRETRAIN, folder, resume=has_state(folder), architecture=TINY)


TIMES = ["seconds", "tokens_per_second"]
"""Columns and keys that no two runs have alike."""
KINDS = {"fine-tuning": (train, "history.csv"), "pre-training": (pretrain, "pretraining.json")}
"""What runs, and a file that stands in a folder only when it is done, or nearly (then its state is still there)."""


def work(kind: str, inputs: Path, folder: Path, kill_at: int, noted: str) -> None:
    """Run one kind; be killed before write number `kill_at`; note how many writes there were."""
    torch.set_num_threads(1)
    writes = 0

    def counted(write: Callable) -> Callable:
        def counting(*args, **options):
            nonlocal writes
            writes += 1
            if writes == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return write(*args, **options)

        return counting

    for name in ("fsync", "replace", "unlink"):
        setattr(os, name, counted(getattr(os, name)))
    for module, name in ((lora, "save_file"), (resume, "save_file"), (transformers.modeling_utils, "safe_save_file")):
        setattr(module, name, counted(getattr(module, name)))
    KINDS[kind][0](inputs, folder)
    Path(noted).write_text(str(writes))


def run(kind: str, inputs: Path, folder: Path, kill_at: int = 0, kill_after: float | None = None) -> int:
    """One process; return its exit code, negative when it was killed."""
    process = processes.Process(target=work, args=(kind, inputs, folder, kill_at, f"{folder}.writes"))
    process.start()
    if kill_after is not None:
        time.sleep(kill_after)
        process.kill()
    process.join(120)
    return process.exitcode


def result(folder: Path) -> dict[str, bytes | str]:
    """What must not depend on a kill: every file of the run, timings left out."""
    files: dict[str, bytes | str] = {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}
    if "history.csv" in files:
        files["history.csv"] = (
            pd.read_csv(folder / "history.csv", dtype=str).drop(columns=TIMES, errors="ignore").to_csv()
        )
    if "README.md" in files:  # the card of pre-training says how many minutes it took
        files["README.md"] = re.sub(rb"\| time \| \d+ minutes", b"", (folder / "README.md").read_bytes())
    for name in {"pretraining.json", "metrics.json"} & files.keys():
        files[name] = json.dumps(_untimed(json.loads(files[name])))
    return files


def _untimed(value: object) -> object:
    if isinstance(value, dict):
        return {key: _untimed(inside) for key, inside in value.items() if key not in TIMES}
    return [_untimed(inside) for inside in value] if isinstance(value, list) else value


def campaign(
    kind: str, folder: Path, kills: int, seed: int, every: int = 1, say: Callable[[str], None] = lambda text: None
) -> dict[str, int]:
    """Kill at every write boundary (or each `every`-th) and `kills` times at random, resume each time, and compare.

    Returns
    -------
    dict
        `writes`: the write boundaries of an uninterrupted run; `boundaries` and `random`: kills of each kind that hit a
        living process.

    Raises
    ------
    AssertionError
        If a run that was killed ends otherwise than the one that was not.
    """
    make_inputs(folder)
    assert run(kind, folder, folder / "warm") == 0  # the first fork also starts the server
    started = time.monotonic()
    assert run(kind, folder, folder / "run") == 0
    seconds = time.monotonic() - started
    expected, last = result(folder / "run"), KINDS[kind][1]
    writes, draw = int((folder / "run.writes").read_text()), random.Random(seed)
    hit = {"writes": writes, "boundaries": 0, "random": 0}
    plans = [("boundaries", dict(kill_at=n)) for n in range(1, writes + 1, every)]
    plans += [("random", dict(kill_after=0.7 * draw.random() * seconds)) for _ in range(kills)]
    for number, (how, plan) in enumerate(plans, 1):
        place = folder / str(number) / "run"  # the name of the folder is part of the model card
        code = run(kind, folder, place, **plan)
        assert code in (0, -signal.SIGKILL), (plan, code)
        hit[how] += code != 0
        if code:
            if not (place / last).exists() or has_state(place):
                assert run(kind, folder, place) == 0, plan
            assert result(place) == expected, plan
        say(f"\r{kind}: {number} of {len(plans)}: {hit}")
    return hit


if __name__ == "__main__":
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 50
    for kind in KINDS:
        with tempfile.TemporaryDirectory() as name:
            total = campaign(kind, Path(name), count, seed=0, say=lambda text: print(text, end="", flush=True))
        print(
            f"\n{kind}: killed at {total['boundaries']} write boundaries and at {total['random']} random moments; "
            "every run ended alike"
        )
