"""Runs killed while they train or save, gone on with, and held against one that was left alone: run by `test_resume`, and at length by hand.

python tests/campaigns/resume.py [KILLS]     (at every write boundary, then KILLS times, 50 by default, at random moments)
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch
from transformers import Qwen2ForCausalLM

from m2helpers import lora
from m2helpers.data import load_dataset
from m2helpers.engine import resume
from m2helpers.engine.resume import has_state
from m2helpers.models import embedded_config, embedded_tokenizer, load_base
from m2helpers.settings import TrainSettings
from m2helpers.simulator import SimulatorSettings, simulate, write_dataset
from m2helpers.training import train_lora

SETTINGS = TrainSettings(
    lora_r=2, learning_rate=1e-2, batch_size=3, max_steps=7, max_length=48, eval_steps=2, save_steps=3, eval_windows=5,
    average=0.9, rescale=0.5, random_start=1,  # everything that a state or a window depends on
)  # fmt: skip
processes = multiprocessing.get_context("forkserver")
# Its own module cannot be among them: the server of Python 3.11 does not know the paths of this process.
processes.set_forkserver_preload(["m2helpers.training", "m2helpers.data", "transformers.models.qwen2.modeling_qwen2"])


def make_inputs(folder: Path) -> None:
    """A tiny base with random weights, and a few simulated series."""
    torch.manual_seed(0)
    tiny = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    Qwen2ForCausalLM(embedded_config(**tiny)).save_pretrained(folder / "base")
    embedded_tokenizer().save_pretrained(folder / "base")
    settings = SimulatorSettings(systems=12, steps=20, t_max=40.0)
    time_points, trajectories, _ = simulate(settings)
    write_dataset(folder / "data.h5", time_points, trajectories, settings)


def train(inputs: Path, folder: Path, kill_at: int, noted: str) -> None:
    """Train, or go on; be killed before write number `kill_at`; note how many writes there were."""
    torch.set_num_threads(1)
    os.environ["M2_LEDGER"] = str(folder.with_suffix(".sqlite"))
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
    for module in (lora, resume):
        module.save_file = counted(module.save_file)
    base, dataset = load_base(str(inputs / "base")), load_dataset(inputs / "data.h5")
    train_lora(base, dataset, SETTINGS, folder, resume=has_state(folder), progress=False)
    Path(noted).write_text(str(writes))


def run(inputs: Path, folder: Path, kill_at: int = 0, kill_after: float | None = None) -> int:
    """One process; return its exit code, negative when it was killed."""
    process = processes.Process(target=train, args=(inputs, folder, kill_at, f"{folder}.writes"))
    process.start()
    if kill_after is not None:
        time.sleep(kill_after)
        process.kill()
    process.join(120)
    return process.exitcode


def result(folder: Path) -> tuple[dict[str, bytes], pd.DataFrame]:
    """What must not depend on a kill: every file of the run, and its history but for timings."""
    files = {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "history.csv"}
    return files, pd.read_csv(folder / "history.csv").drop(columns="tokens_per_second")


def campaign(folder: Path, kills: int, seed: int, say: Callable[[str], None] = lambda text: None) -> dict[str, int]:
    """Kill at every write boundary and `kills` times at random, go on each time, and compare.

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
    assert run(folder, folder / "warm") == 0  # the first fork also starts the server
    started = time.monotonic()
    assert run(folder, folder / "run") == 0
    seconds = time.monotonic() - started
    files, history = result(folder / "run")
    writes, draw = int((folder / "run.writes").read_text()), random.Random(seed)
    hit = {"writes": writes, "boundaries": 0, "random": 0}
    plans = [("boundaries", dict(kill_at=n)) for n in range(1, writes + 1)]
    plans += [("random", dict(kill_after=draw.random() * seconds)) for _ in range(kills)]
    for number, (kind, plan) in enumerate(plans, 1):
        place = folder / str(number) / "run"  # the name of the folder is part of the model card
        code = run(folder, place, **plan)
        assert code in (0, -signal.SIGKILL), (plan, code)
        hit[kind] += code != 0
        if code:
            if not (place / "history.csv").exists() or has_state(place):
                assert run(folder, place) == 0, plan
            ended, rows = result(place)
            assert ended == files and rows.equals(history), plan
        say(f"\r{number} of {len(plans)}: {hit}")
    return hit


if __name__ == "__main__":
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 50
    with tempfile.TemporaryDirectory() as name:
        total = campaign(Path(name), count, seed=0, say=lambda text: print(text, end="", flush=True))
    print(
        f"\nkilled at {total['boundaries']} write boundaries and at {total['random']} random moments; every run ended alike"
    )
