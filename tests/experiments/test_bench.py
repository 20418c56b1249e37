"""The benchmarks, on a tiny model: what they record, not how fast it is."""

import json
from types import SimpleNamespace
from typing import get_args, get_type_hints

import pytest
import torch

from m2helpers.cli.pages import Bench
from m2helpers.experiments import bench, timing
from m2helpers.experiments.bench import BENCHMARKS, run_benchmark
from m2helpers.files import UserError
from m2helpers.ledger import Ledger
from m2helpers.models import load_base


@pytest.fixture
def quick(tiny_folder, monkeypatch, tmp_path):
    """A tiny model in place of both, one step and one turn each."""
    monkeypatch.setenv("M2_LEDGER", str(tmp_path / "ledger.sqlite"))
    monkeypatch.setattr(bench, "_full_size", lambda: load_base(str(tiny_folder)))
    monkeypatch.setattr(bench, "load_base", lambda name, **options: load_base(str(tiny_folder), **options))
    monkeypatch.setattr(bench, "ROUNDS", 1)
    monkeypatch.setattr(bench, "STEPS", 1)
    monkeypatch.setattr(bench, "STEPS_EMBEDDED", 1)
    monkeypatch.setattr(bench, "CONTEXTS", (8, 16))
    waited = {"as it comes": [4.0, 3.0, 5.0], "passive": [2.0]}
    monkeypatch.setattr(bench, "compare_waiting", lambda data, rounds: {"forecasts": waited, "validation": waited})
    errors = {torch.float32: 0.2, torch.bfloat16: 0.201}  # a tiny model's own forecasts do not parse
    monkeypatch.setattr(bench, "evaluate", lambda base, *_, **__: [SimpleNamespace(mae=errors[base.model.dtype])])
    return tmp_path


SLOW = ("train", "train-embedded", "decode-embedded", "samples", "samples-embedded", "rivals", "rivals-decode")
LONG = ("rivals",)


def _marks(name):
    return [pytest.mark.slow] * (name in SLOW) + [pytest.mark.long] * (name in LONG)


@pytest.mark.parametrize("name", [pytest.param(name, marks=_marks(name)) for name in BENCHMARKS])
def test_both_sides_are_timed_and_compared(name, quick, long_data):
    record = quick / "benchmarks.json"
    record.write_text(json.dumps({"kept": {}}))
    entry = run_benchmark(name, long_data, record)
    assert json.loads(record.read_text()) == {"kept": {}, name: entry}
    assert {"about", "machine", "date", "rows"} == set(entry) - {"profile"}
    for shares in entry.get("profile", {"": {"all": 1}}).values():
        assert sum(shares.values()) == pytest.approx(1) and min(shares.values()) > 0
    for place, row in enumerate(entry["rows"]):
        assert row["seconds"] > 0 and row["times"] and len(row["side"]) > 5
        alternative = next(r for r in entry["rows"] if all(r.get(k) == row.get(k) for k in ("context", "work")))
        assert row["ratio"] == pytest.approx(alternative["seconds"] / row["seconds"])
        if name.startswith("decode"):
            assert 0 < row["seconds_after_prefill"] < row["seconds"]
        if name == "context":  # scoring more costs more
            assert (row["flops"] < alternative["flops"]) == (row is not alternative)
        if name == "decode-embedded":
            expected = (0.201, 0.5) if "bfloat16" in row["side"] else (0.2, 0)
            assert (row["mae"], row["mae_change"]) == pytest.approx(expected)
        if name.startswith("train"):
            assert row["peak_gb"] > 0 and len(row["times"]) == 1
            assert (row["side"] == "peft + Trainer") == (place == 0)
        if name == "rivals":
            assert (row["rows"], row["length"], row["numeric"]) == (4, 512, row["side"] == "numeric head")
            assert row["peak_gb"] > 0 and row["utilisation"] > 0 and row["first_seconds"] > 0
    sides = dict.fromkeys(("decode", "samples", "samples-embedded"), 2) | {"context": 4, "threads": 4}
    assert len(entry["rows"]) == (sides | {"rivals": 5, "rivals-decode": 6}).get(name, 3)
    assert not Ledger(quick / "ledger.sqlite").entries()


def test_the_command_offers_every_benchmark():
    """Its names stand there once more, so that help need not load the benchmarks."""
    assert set(get_args(get_type_hints(Bench)["name"])) == {*BENCHMARKS, "classic"}


def test_a_record_says_so_when_other_programs_ran_beside(quick, long_data, monkeypatch):
    for load, told in ((0.4, False), (3.21, True)):
        monkeypatch.setattr(timing.os, "getloadavg", lambda load=load: (load, 9.0, 9.0))
        machine = run_benchmark("threads", long_data, quick / "b.json")["machine"]
        assert machine.endswith(", beside other load (3.2 running on average)") == told


def test_another_name_is_refused(long_data, tmp_path):
    with pytest.raises(UserError, match="bench 'speed': choose from train, decode"):
        run_benchmark("speed", long_data, tmp_path / "b.json")
    assert not (tmp_path / "b.json").exists()


def test_the_full_size_model_is_qwens(monkeypatch):
    """Its sizes, on a smaller architecture: the true one is built in test_true_size."""
    monkeypatch.setitem(bench.QWEN_05B, "num_hidden_layers", 1)
    monkeypatch.setitem(bench.QWEN_05B, "vocab_size", 100)
    model = bench.random_qwen()
    assert model.config.hidden_size == 896 and str(model.dtype) == "torch.bfloat16" and not model.training
    assert model.lm_head.weight is model.model.embed_tokens.weight and 0.01 < model.lm_head.weight.float().std() < 0.03
