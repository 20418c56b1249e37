"""Several processes that share a run, held against one that has it for itself: windows, losses, bill, stops, deaths, resumes.

Processes of a CPU that talk through gloo, forked from a server that has loaded everything; float32, so that losses can agree.
"""

import json
import os
import signal
import socket
import subprocess
import sys
from datetime import timedelta
from itertools import chain
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from m2helpers import models
from m2helpers.__main__ import main
from m2helpers.engine import processes
from m2helpers.files import read_json
from m2helpers.flops import QWEN_15B
from m2helpers.flops.account import CAP
from m2helpers.ledger import Ledger
from m2helpers.models import embedded_tokenizer
from m2helpers.pretraining import batches, synthetic
from m2helpers.pretraining import run as pretraining
from m2helpers.training import Training
from m2helpers.training import run as training_run
from tests.campaigns.resume import TINY, make_inputs
from tests.campaigns.resume import processes as server

CHECKOUT = Path(__file__).resolve().parents[2]
# Batches of five: two and three rows of two processes, two, one, one and one of four; of a validation's last, one and none.
SETTINGS = dict(lora_r=2, lora_dropout=0, learning_rate=1e-2, batch_size=5, max_steps=7, max_length=48, eval_steps=2)
SETTINGS |= dict(save_steps=3, eval_windows=6, rescale=0.5, random_start=1, average=0.9)
PRETRAINING = dict(
    tokens=5 * 5 * 32, batch_size=5, max_length=32, warmup_steps=2, log_steps=3, eval_steps=3, eval_texts=2
)


def _flags(settings):
    return [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]


def _words(kind, inputs, folder, resume):
    if kind == "pretrain":
        words = ["pretrain", *_flags(PRETRAINING | {"save_steps": 2})]
    else:
        words = ["train", f"--data={inputs / 'data.h5'}", f"--model={inputs / 'base'}", *_flags(SETTINGS)]
    return [*words, f"--output-dir={folder}", *["--resume"] * resume]


def work(place, log, words, number=None, at=0, sent=0, cap=CAP, timeout=120):
    """What one process does: a command, and process `number` is sent a signal in step `at`."""
    os.environ |= {**place, "M2_LEDGER": f"{log.parent}.sqlite", "M2_DEVICE": "cpu"}
    torch.set_num_threads(1)
    with open(f"{log}.txt", "wb") as stream:
        os.dup2(stream.fileno(), 1), os.dup2(stream.fileno(), 2)
    models.has_bfloat16 = lambda device: False
    processes.TIMEOUT = timedelta(seconds=timeout)
    training_run.default_ledger = lambda base: Ledger(f"{log.parent}.sqlite", cap)
    few = {name: pretraining.FAMILIES[name] for name in ("glycolysis", "schnakenberg", "damped_oscillations")}
    pretraining.FAMILIES = batches.FAMILIES = synthetic.FAMILIES = few
    whole = pretraining.pretrain
    pretraining.pretrain = lambda *a, **o: whole(*a, **o, architecture=TINY)
    rows = []

    def note(module, args):
        if isinstance(module, nn.Embedding) and module.training:
            rows.append(args[0].tolist())  # the windows that this process works on, padded

    def step(wrapped):
        def stepping(run, *rest):
            if os.environ["RANK"] == str(number) and run.state.step + 1 == at:
                for _ in range(1 + (sent == signal.SIGTERM)):  # as from a launcher that passes on what all have got
                    os.kill(os.getpid(), sent)
            return wrapped(run, *rest)

        return stepping

    torch.nn.modules.module.register_module_forward_pre_hook(note)
    Training.step = step(Training.step)
    pretraining._Pretraining.step = step(pretraining._Pretraining.step)
    code = main(words)
    Path(f"{log}.json").write_text(json.dumps(rows))
    sys.exit(code)


class Runs:
    """Runs in one folder, each by some processes."""

    def __init__(self, inputs, folder, kind="train"):
        self.inputs, self.folder, self.kind = inputs, folder, kind
        self.words = []

    def start(self, count, resume=False, **options):
        """Start them; return the processes."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        words = [*_words(self.kind, self.inputs, self.folder, resume), *self.words]
        started = []
        for rank in range(count):
            place = {"RANK": str(rank), "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            log = self.folder.with_name(f"{self.folder.name}-{rank}")
            process = server.Process(target=work, args=(place, log, words), kwargs=options)
            process.start()
            started.append(process)
        return started

    def run(self, count, **options):
        """Start them and wait; return their exit codes."""
        started = self.start(count, **options)
        for process in started:
            process.join(120)
        assert all(process.exitcode is not None for process in started), "it hangs"
        return [process.exitcode for process in started]

    def said(self, rank):
        """What a process printed, its bar left out."""
        text = self.folder.with_name(f"{self.folder.name}-{rank}.txt").read_text()
        return [line for line in text.splitlines() if "step/s" not in line and line.strip()]

    def rows(self, count):
        """The windows of every step, sorted, over all processes."""
        of_each = [
            json.loads(self.folder.with_name(f"{self.folder.name}-{rank}.json").read_text()) for rank in range(count)
        ]
        return [sorted(chain(*parts)) for parts in zip(*of_each, strict=True)]

    def losses(self):
        """Losses of training and validation."""
        if self.kind == "pretrain":
            record = read_json(self.folder / "pretraining.json")
            return [[row["loss"], row["val_loss"] or 0] for row in record["history"]] + [
                [*record["loss_by_family"].values()][:2]
            ]
        return pd.read_csv(self.folder / "history.csv")[["loss", "val_loss"]].to_numpy().tolist()

    def bill(self):
        """What was billed, by entry."""
        entries = Ledger(f"{self.folder.parent}.sqlite").entries()
        return [(e["kind"], e["tokens"], e["flops"], e["state"]) for e in entries if e["run"] == self.folder.name]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    make_inputs(folder)
    return folder


@pytest.fixture(scope="module")
def alone(inputs, tmp_path_factory):
    """What one process makes of each kind of run."""
    made = {}
    for kind in ("train", "pretrain"):
        made[kind] = Runs(inputs, tmp_path_factory.mktemp(kind) / "run", kind)
        assert made[kind].run(1) == [0]
    return made


def _agree(ours, theirs):
    np.testing.assert_allclose(ours.losses(), theirs.losses(), rtol=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "count"), [("train", 2), ("train", 4), ("pretrain", 2), ("pretrain", 4)])
def test_a_shared_run_is_that_of_one_process(inputs, alone, tmp_path, kind, count):
    runs = Runs(inputs, tmp_path / "run", kind)
    assert runs.run(count) == [0] * count
    assert runs.rows(count) == alone[kind].rows(1) and len(runs.rows(count)) in (5, 7)
    _agree(runs, alone[kind])
    assert runs.bill() == alone[kind].bill() and bool(runs.bill()) == (kind == "train")
    assert {path.name for path in runs.folder.iterdir()} == {path.name for path in alone[kind].folder.iterdir()}
    assert "run" in runs.said(0)[-1] and not any(map(runs.said, range(1, count)))


@pytest.mark.slow
def test_a_signal_to_one_stops_all_after_the_same_step(inputs, alone, tmp_path):
    """In step 4, between two saves; it goes on with four processes."""
    runs = Runs(inputs, tmp_path / "run")
    assert runs.run(2, number=1, at=4, sent=signal.SIGTERM) == [1, 1]
    assert runs.said(0) == ["m2helpers train: run: stopped at step 4 of 7; --resume goes on from there"]
    assert not runs.said(1)
    assert runs.run(4, resume=True) == [0] * 4
    _agree(runs, alone["train"])
    assert [e[3] for e in runs.bill()] == ["settled"] * len(runs.bill())
    assert sum(e[2] for e in runs.bill()) == sum(e[2] for e in alone["train"].bill())


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1])
def test_a_killed_process_ends_the_others_and_the_run_goes_on_from_its_save(inputs, alone, tmp_path, number):
    """In step 5, two steps after a save; it goes on with one process."""
    runs = Runs(inputs, tmp_path / "run")
    codes = runs.run(2, number=number, at=5, sent=signal.SIGKILL)
    assert codes[number] == -signal.SIGKILL and codes[1 - number] == 1
    (line,) = runs.said(1 - number)
    assert line.startswith("m2helpers train: another of the 2 processes has ended, or hangs")
    assert runs.run(1, resume=True) == [0]
    _agree(runs, alone["train"])


@pytest.mark.slow
def test_a_process_that_hangs_ends_the_run_in_time(inputs, tmp_path):
    runs = Runs(inputs, tmp_path / "run")
    first, hung = runs.start(2, number=1, at=5, sent=signal.SIGSTOP, timeout=10)
    first.join(90)
    hung.kill()
    assert first.exitcode == 1 and "has ended, or hangs" in runs.said(0)[-1]
    assert (runs.folder / "state.safetensors").exists()


@pytest.mark.slow
def test_where_the_budget_ends_all_of_them_do(inputs, alone, tmp_path):
    """The cap leaves room for the steps up to the first save."""
    runs = Runs(inputs, tmp_path / "run")
    assert runs.run(2, cap=int(1.2 * sum(e[2] for e in alone["train"].bill()[:2]))) == [1, 1]
    (line,) = runs.said(0)
    assert "stopped at step 3 of 7; --resume goes on from step 3" in line and "FLOPs are needed next" in line
    assert not runs.said(1)


@pytest.mark.slow
def test_fewer_rows_than_processes_are_refused(inputs, tmp_path):
    runs = Runs(inputs, tmp_path / "run")
    runs.words = ["--batch-size=1"]
    assert runs.run(2) == [1, 1]
    (line,) = runs.said(0)
    assert line.startswith("m2helpers train: batch_size 1: fewer than the 2 processes") and not runs.said(1)
    assert not runs.folder.exists()


def test_commands_that_nobody_can_share_are_refused(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["ledger"]) == 1
    assert (
        "m2helpers ledger: several processes cannot share it, only train, pretrain, instruct" in capsys.readouterr().err
    )


def _launched(program, words, folder):
    """Run a command as a user does, in a folder and with a ledger of its own; return what it printed."""
    path = Path(sys.executable).with_name(program)
    environment = {**os.environ, "M2_LEDGER": str(folder / f"{program}.sqlite"), "PYTHONPATH": str(CHECKOUT)}
    done = subprocess.run([path, *words], env=environment, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_torchrun_starts_them(inputs, tmp_path):
    words = ["-m", "m2helpers", *_words("train", inputs, tmp_path / "run", False), "--max-steps=2"]
    printed = _launched("torchrun", ["--nproc-per-node=2", *words], tmp_path)
    assert printed.count("best validation loss") == 1 and (tmp_path / "run" / "history.csv").is_file()


@pytest.mark.slow
def test_accelerate_starts_a_run_on_instructions(tmp_path, monkeypatch, capsys):
    """Trainer deals its rows out, over a base in four bits, which one process alone has answered with before; held against one process."""
    narrow = dict(num_hidden_layers=2, hidden_size=192, intermediate_size=128, vocab_size=259, eos_token_id=258)
    torch.manual_seed(0)
    Qwen2ForCausalLM(Qwen2Config(**QWEN_15B | narrow, initializer_range=0.3)).save_pretrained(tmp_path / "narrow")
    embedded_tokenizer().save_pretrained(tmp_path / "narrow")
    rows = [{"instruction": "Next?", "input": "1;" * n, "output": str(n)} for n in range(1, 9)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["instruct", f"--train={tmp_path / 'rows.jsonl'}", f"--val={tmp_path / 'rows.jsonl'}"]
    words += [f"--model={tmp_path / 'narrow'}", *_flags(dict(lora_r=2, lora_dropout=0, epochs=1, batch_size=1))]
    words += _flags(dict(max_length=128, four_bit=1, answers=4))
    launch = ["launch", "--multi_gpu", "--num_processes=2", "-m", "m2helpers"]
    printed = _launched("accelerate", [*launch, *words, f"--output-dir={tmp_path / 'shared'}"], tmp_path)
    monkeypatch.setenv("M2_LEDGER", str(tmp_path / "alone.sqlite"))
    assert main([*words, f"--output-dir={tmp_path / 'alone'}"]) == 0
    for text in (printed, capsys.readouterr().out):
        assert text.count("adaptermodel.zip") == text.count("trainable params") == 1
    ours, theirs = (pd.read_csv(tmp_path / name / "history.csv") for name in ("shared", "alone"))
    np.testing.assert_allclose(ours[["loss", "val_loss"]], theirs[["loss", "val_loss"]], rtol=1e-3)
    assert ours["flops"].tolist() == theirs["flops"].tolist()
    ours, theirs = (Ledger(tmp_path / f"{name}.sqlite").entries() for name in ("accelerate", "alone"))
    assert [(e["kind"], e["flops"]) for e in ours] == [(e["kind"], e["flops"]) for e in theirs]
    ours, theirs = (read_json(tmp_path / name / "metrics.json") for name in ("shared", "alone"))
    assert ours["before"] == theirs["before"]
