"""The command line, run as a user runs it."""

import io
import json
import os
import pkgutil
import signal
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pandas as pd
import pytest

import m2helpers
from m2helpers import paths
from m2helpers.__main__ import main


@pytest.fixture
def data_file(tmp_path):
    path = tmp_path / "small.h5"
    assert main(["simulate", "--out", str(path), "--systems", "20", "--seed", "1"]) == 0
    return path


def test_simulate_writes_the_schema(data_file):
    with h5py.File(data_file) as file:
        assert file["trajectories"].shape == (20, 100, 2)
        assert file["time"].shape == (100,)


def test_encode_writes_one_series_a_line(data_file, tmp_path):
    assert main(["encode", "--data", str(data_file), "--output-dir", str(tmp_path / "text"), "--precision", "1"]) == 0
    lines = (tmp_path / "text" / "train.txt").read_text().splitlines()
    assert len(lines) == 16 and all(line.endswith(";") and line.count(";") == 100 for line in lines)
    assert json.loads((tmp_path / "text" / "settings.json").read_text())["precision"] == 1


def test_flops_of_qwen_needs_no_network(tmp_path):
    command = "flops --model Qwen/Qwen2.5-0.5B-Instruct --batch-size 4 --length 512 --lora-r 8 --train --json".split()
    assert main([*command, str(tmp_path / "flops.json")]) == 0
    report = json.loads((tmp_path / "flops.json").read_text())
    assert (report["parameters"], report["trainable"]) == (494_032_768, 540_672 + 151_936)
    assert sum(report["components"].values()) == report["forward"] == report["total"] / 3


def _stopped(*_, **__):
    raise KeyboardInterrupt


@pytest.mark.slow
def test_train_evaluate_forecast(tiny_folder, data_file, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(paths, "BASELINE_CACHE", tmp_path / "cache")
    run, common = tmp_path / "run", ["--data", str(data_file)]
    settings = (
        "--stage initial --max-steps 2 --max-length 64 --batch-size 2 --eval-windows 2 --target-modules q_proj,k_proj"
    )
    assert main(["train", "--model", str(tiny_folder), "--output-dir", str(run), *common, *settings.split()]) == 0
    assert json.loads((run / "config.json").read_text())["settings"]["target_modules"] == ["q_proj", "k_proj"]

    metrics = tmp_path / "metrics.json"
    arguments = ["evaluate", "--run", str(run), "--context", "128", "--split", "validation", "--json", str(metrics)]
    capsys.readouterr()
    assert main([*arguments, *common]) == 0
    (row,) = json.loads(metrics.read_text())
    assert row["n"] == 8 and row["run"] == str(run)
    table = capsys.readouterr().out
    assert "ODE fit" in table and "last value" in table

    metrics.unlink()
    with monkeypatch.context() as patch:
        patch.setattr("m2helpers.evaluation.measure.evaluate_baselines", _stopped)
        assert main([*arguments, *common]) == 1
    assert json.loads(metrics.read_text())[0]["n"] == 8  # what was measured is kept

    series, out = tmp_path / "series.csv", tmp_path / "forecast.csv"
    pd.DataFrame({"time": range(30), "a": np.sin(np.arange(30)) + 2}).to_csv(series, index=False)
    assert main(["forecast", str(series), "--model", str(tiny_folder), "--steps", "3", "--out", str(out)]) == 1
    assert "nothing was forecast: nothing that the model wrote parsed" in capsys.readouterr().err
    assert not out.exists()  # random weights write no numbers
    again = ["--constrained", "--steps", "3", "--out", str(out)]
    assert main(["forecast", str(series), "--model", str(tiny_folder), *again]) == 0
    assert list(pd.read_csv(out).columns) == ["series", "sample", "step", "time", "a"]
    assert pd.read_csv(out)[["step", "time"]].values.tolist() == [[1, 30], [2, 31], [3, 32]]
    pd.DataFrame({"a": (np.sin(np.arange(30)) + 2) * 1e-7}).to_csv(series, index=False)
    assert main(["forecast", str(series), "--model", str(tiny_folder), *again]) == 0
    assert pd.read_csv(out)["a"].max() > 0  # small units keep their digits


@pytest.mark.slow
def test_a_run_keeps_its_scale_on_other_data(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("m2helpers.evaluation.measure.evaluate_baselines", lambda *_, **__: [])
    own, other, run, out = (tmp_path / name for name in ("own.h5", "other.h5", "run", "metrics.json"))
    for path in (own, other):
        assert main(["simulate", "--out", str(path), "--systems", "10"]) == 0
    with h5py.File(other, "a") as file:
        file["trajectories"][...] *= 10
    brief = "--stage initial --max-steps 1 --max-length 64 --batch-size 1 --eval-windows 1 --precision 3".split()
    model = ["--model", str(tiny_folder)]
    assert main(["train", *model, "--output-dir", str(run), "--data", str(own), *brief]) == 0
    measured = ["--data", str(other), "--context", "128", "--json", str(out)]
    assert main(["evaluate", "--run", str(run), *measured]) == 0
    scale = json.loads((run / "config.json").read_text())["scale"]
    (row,) = json.loads(out.read_text())
    assert (row["scale"], row["precision"]) == (scale, 3)

    used = []
    made = SimpleNamespace(values=np.ones((2, 2)))

    def forecast(base, codec, series, *_, **__):
        used.extend([codec] * len(series))
        return [made] * len(series)

    monkeypatch.setattr("m2helpers.forecasting.tables.forecast", forecast)
    ahead = ["--steps", "2", "--out", str(tmp_path / "ahead.csv")]
    for choice in ("run", "own"):
        assert main(["forecast", str(other), "--run", str(run), "--scale", choice, *ahead]) == 0
    assert {codec.scale for codec in used[:10]} == {scale} and scale not in {codec.scale for codec in used[10:]}
    assert {codec.precision for codec in used} == {3}


@pytest.mark.slow
def test_a_run_with_a_numeric_head_forecasts_constrained(tiny_folder, data_file, tmp_path, monkeypatch):
    """It never learned to leave the other characters alone: random weights would write them."""
    monkeypatch.setattr(paths, "BASELINE_CACHE", tmp_path / "cache")
    run, metrics, common = tmp_path / "run", tmp_path / "metrics.json", ["--data", str(data_file)]
    settings = "--stage initial --max-steps 1 --max-length 64 --eval-windows 2 --numeric-head 1".split()
    assert main(["train", "--model", str(tiny_folder), "--output-dir", str(run), *common, *settings]) == 0
    assert main(["evaluate", "--run", str(run), "--protocol", "L20", "--json", str(metrics), *common]) == 0
    (row,) = json.loads(metrics.read_text())
    assert row["constrained"] and row["n_valid"] == row["n"] > 0
    np.savetxt(tmp_path / "own.csv", np.abs(np.sin(np.arange(30)))[:, None], delimiter=",")
    ahead = ["--steps", "3", "--out", str(tmp_path / "ahead.csv")]
    assert main(["forecast", str(tmp_path / "own.csv"), "--run", str(run), *ahead]) == 0
    assert len(pd.read_csv(tmp_path / "ahead.csv")) == 3


@pytest.mark.slow
def test_the_ledger_shows_what_commands_spent(tiny_folder, data_file, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("M2_LEDGER", str(tmp_path / "ledger.sqlite"))
    monkeypatch.setattr(paths, "BASELINE_CACHE", tmp_path / "cache")
    model, run = ["--model", str(tiny_folder)], tmp_path / "my-run"
    settings = "--stage final --max-steps 2 --max-length 64 --batch-size 2 --eval-windows 2".split()
    assert main(["train", *model, "--output-dir", str(run), "--data", str(data_file), *settings]) == 0
    assert main(["evaluate", "--run", str(run), "--protocol", "L20", "--data", str(data_file)]) == 0
    np.savetxt(tmp_path / "own.csv", np.abs(np.sin(np.arange(30)))[:, None], delimiter=",")
    ahead = ["--steps", "2", "--out", str(tmp_path / "ahead.csv"), "--constrained"]
    assert main(["forecast", str(tmp_path / "own.csv"), *model, *ahead]) == 0
    capsys.readouterr()
    files = [tmp_path / "ledger.json", tmp_path / "ledger.csv"]
    assert main(["ledger", *model, "--json", str(files[0]), "--csv", str(files[1])]) == 0
    entries = json.loads(files[0].read_text())["entries"]
    spent = {(e["stage"], e["run"], e["kind"]) for e in entries}
    assert spent == {("final", "my-run", k) for k in ("train", "validate", "generate")} | {
        ("untrained", "tiny", "generate")
    }
    table = pd.read_csv(files[1])
    assert table["flops"].sum() == json.loads(files[0].read_text())["spent"]
    history = pd.read_csv(run / "history.csv")
    assert table[table["kind"] != "generate"]["flops"].sum() == history["flops"].iloc[-1]
    printed = capsys.readouterr().out
    assert "left of 1e+17" in printed and "my-run" in printed and "share of the cap" in printed


def test_a_plan_is_priced_without_the_network(tmp_path, capsys):
    path = tmp_path / "plan.json"
    model = ["--model", "Qwen/Qwen2.5-0.5B-Instruct"]
    assert main(["flops", *model, "--plan", "qwen2.5-0.5b", "--json", str(path)]) == 0
    rows = {row["stage"]: row for row in json.loads(path.read_text())}
    assert list(rows) == ["untrained", "initial", "grid", "context", "precision", "final"]
    assert 0.7 < sum(row["share of the cap"] for row in rows.values()) < 1
    assert "further steps of its last run" in capsys.readouterr().out
    assert main(["flops", *model, "--plan", "mine"]) == 1
    assert "choose from embedded, qwen2.5-0.5b" in capsys.readouterr().err


def test_a_users_mistake_is_one_line_and_status_1(tmp_path, capsys):
    missing = tmp_path / "missing.h5"
    assert main(["encode", "--data", str(missing), "--output-dir", str(tmp_path)]) == 1
    message = capsys.readouterr().err
    assert message.startswith(f"m2helpers encode: {missing}: no such file") and message.count("\n") == 1


@pytest.mark.slow
def test_a_stage_starts_from_the_settings_of_its_bases_plan(tiny_folder, data_file, tmp_path, capsys):
    command = ["train", "--data", str(data_file), "--model", str(tiny_folder), "--output-dir", str(tmp_path / "run")]
    brief = "--max-steps 1 --max-length 64 --batch-size 2 --eval-windows 2".split()
    assert main([*command, "--stage", "initial", *brief]) == 0
    assert json.loads((tmp_path / "run" / "config.json").read_text())["settings"]["learning_rate"] == 1e-4
    assert main([*command, "--stage", "extended", *brief]) == 1
    assert "has no such run; give initial or final" in capsys.readouterr().err
    assert main(["sweep", "ablation", "--model", str(tiny_folder), "--output-dir", str(tmp_path / "sweep")]) == 1
    assert "this plan has no such runs" in capsys.readouterr().err


def test_a_series_that_cannot_be_sampled_costs_no_other(tiny_folder, tmp_path, capsys, monkeypatch):
    """Of two series, no sample of the first parses."""
    drawn = iter([[np.ones((0, 2, 1)), np.ones((3, 2, 1))]])
    monkeypatch.setattr("m2helpers.forecasting.tables.sample_many", lambda *_, **__: next(drawn))
    with h5py.File(tmp_path / "two.h5", "w") as file:
        file["trajectories"] = np.ones((2, 8, 1))
    command = ["forecast", str(tmp_path / "two.h5"), "--model", str(tiny_folder), "--steps", "2", "--samples", "3"]
    assert main([*command, "--out", str(tmp_path / "out.csv")]) == 0
    assert "; 3 did not parse whole: with --constrained all do" in capsys.readouterr().out
    assert pd.read_csv(tmp_path / "out.csv")["series"].tolist() == [1] * 6
    drawn = iter([[np.ones((0, 2, 1))] * 2])
    assert main([*command, "--out", str(tmp_path / "none.csv")]) == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith(
        f"m2helpers forecast: {tmp_path / 'two.h5'}: nothing was forecast: series 0: nothing that"
    )
    assert not (tmp_path / "none.csv").exists()


def test_a_series_of_zeros_is_forecast_as_zeros(tmp_path, monkeypatch, tiny_folder):
    """It has no scale of its own to be written at, and needs none."""
    read = []
    monkeypatch.setattr(
        "m2helpers.forecasting.tables.forecast",
        lambda base, codec, series, *_, **__: read.extend(series) or [SimpleNamespace(values=s[-2:]) for s in series],
    )
    with h5py.File(tmp_path / "two.h5", "w") as file:
        file["trajectories"] = np.stack([np.ones((8, 1)), np.zeros((8, 1))])
    out = tmp_path / "out.csv"
    command = ["forecast", str(tmp_path / "two.h5"), "--model", str(tiny_folder), "--steps", "2", "--out", str(out)]
    assert main(command) == 0
    assert (read[1] == 0).all() and pd.read_csv(out)["variable_0"].tolist() == [1, 1, 0, 0]


@pytest.fixture
def daily(tmp_path):
    """Forty days of two populations, in a file of the kind that people have."""
    path, t = tmp_path / "daily.csv", np.arange(40)
    frame = pd.DataFrame({"prey": 20 + 8 * np.sin(t / 3), "predator": 9 + 4 * np.cos(t / 3)})
    frame.insert(0, "time", pd.date_range("2021-01-01", periods=40).strftime("%Y-%m-%d"))
    frame.round(3).to_csv(path, index=False)
    return path


@pytest.mark.slow
def test_names_and_dates_go_on_and_bands_are_drawn(daily, tiny_folder, capsys):
    out, picture = daily.with_name("out.csv"), daily.with_name("out.png")
    command = ["forecast", str(daily), "--model", str(tiny_folder), "--steps", "3", "--constrained", "--out", str(out)]
    assert main([*command, "--samples", "4", "--levels", "0.1,0.5,0.9", "--plot", str(picture)]) == 0
    frame = pd.read_csv(out)
    names = [f"{name}_{level}" for name in ("prey", "predator") for level in (0.1, 0.5, 0.9)]
    assert list(frame.columns) == ["series", "step", "time", *names]
    assert frame["time"].tolist() == ["2021-02-10", "2021-02-11", "2021-02-12"]
    assert picture.read_bytes().startswith(b"\x89PNG")
    said = "2 variables prey, predator; time taken as time, 2021-01-01 to 2021-02-09 (daily); 40 steps"
    assert capsys.readouterr().err == f"m2helpers forecast: {said}\n"


def test_what_cannot_be_written_costs_nothing(daily, tiny_folder, capsys, monkeypatch):
    """Refused before the model is loaded."""
    monkeypatch.setattr("m2helpers.models.load_base", None)
    before = daily.read_bytes()
    command = ["forecast", str(daily), "--model", str(tiny_folder), "--steps", "3"]
    for out, message in (
        (daily, "is the input"),
        (daily.parent, "is a folder"),
        (daily.with_name("out.xls"), "ending '.xls'"),
    ):
        assert main([*command, "--out", str(out)]) == 1
        assert message in capsys.readouterr().err
    assert main([*command, "--out", str(daily.with_name("out.csv")), "--levels", "0.5"]) == 1
    assert "--levels needs samples" in capsys.readouterr().err
    assert main([*command, "--out", str(daily.with_name("out.csv")), "--plot", "picture.gif"]) == 1
    assert "--plot picture.gif: unknown ending" in capsys.readouterr().err
    assert daily.read_bytes() == before and [path.name for path in daily.parent.iterdir()] == ["daily.csv"]


@pytest.mark.slow
def test_the_last_rows_of_a_table_are_held_back(daily, tiny_folder, capsys):
    out, picture = daily.with_name("scores.csv"), daily.with_name("held.svg")
    command = ["backtest", str(daily), "--model", str(tiny_folder), "--steps", "3", "--windows", "2", "--samples", "3"]
    assert main([*command, "--out", str(out), "--plot", str(picture)]) == 0
    frame = pd.read_csv(out)
    assert frame["method"].tolist() == ["this model", "last value", "last season", "context parroting"] * 2
    prey = pd.read_csv(daily)["prey"].to_numpy()
    errors = np.abs(np.concatenate([prey[34:37] - prey[33], prey[37:] - prey[36]]))
    assert frame.loc[1, "mae"] == pytest.approx(errors.mean())
    assert "context parroting" in capsys.readouterr().out and picture.read_text().startswith("<?xml")


def test_options_say_what_a_table_holds(daily, tiny_folder, capsys):
    out = daily.with_name("out.csv")
    command = ["forecast", str(daily), "--model", str(tiny_folder), "--steps", "2", "--constrained", "--out", str(out)]
    assert main([*command, "--columns", "predator", "--time", "none", "--last", "20"]) == 0
    assert list(pd.read_csv(out).columns) == ["series", "sample", "step", "predator"]
    assert "1 variable predator; 40 steps; left out: time, prey; the last 20 used\n" in capsys.readouterr().err
    assert main([*command, "--no-header"]) == 1
    assert "line 1, column variable_1 is 'prey'" in capsys.readouterr().err


def test_a_table_given_for_the_dataset_is_shown_where_it_belongs(daily, capsys):
    assert main(["evaluate", "--data", str(daily)]) == 1
    assert f"for a table of your own: python -m m2helpers backtest {daily} --steps N" in capsys.readouterr().err


def test_a_full_disk_is_one_line_and_status_1(tmp_path, capsys, monkeypatch):
    """As HDF5 tells it: with no number and no name."""

    def full(*_):
        raise OSError("Unable to create file (no space left)")

    monkeypatch.setattr(h5py, "File", full)
    path = tmp_path / "data.h5"
    assert main(["simulate", "--systems", "10", "--out", str(path)]) == 1
    assert (
        capsys.readouterr().err
        == f"m2helpers simulate: {path}: Unable to create file (no space left); check name and disk\n"
    )


def test_output_that_cannot_be_written_is_one_line_and_status_1(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main(["simulate", "--systems", "10", "--out", str(tmp_path / "file" / "data.h5")]) == 1
    message = capsys.readouterr().err
    assert message.startswith("m2helpers simulate: ") and message.count("\n") == 1


def test_simulate_replaces_a_file_only_when_told_to(tmp_path, capsys):
    path = tmp_path / "data.h5"
    path.write_text("years of work")
    command = ["simulate", "--systems", "10", "--out", str(path)]
    assert main(command) == 1 and path.read_text() == "years of work"
    assert (
        capsys.readouterr().err
        == f"m2helpers simulate: --out {path}: exists; give another name, or --overwrite to replace it\n"
    )
    assert main([*command, "--overwrite"]) == 0 and h5py.is_hdf5(path)


def test_the_output_of_a_forecast_is_refused_in_its_own_words_before_anything_is_read(tmp_path, capsys):
    for command in "forecast", "backtest":
        assert main([command, str(tmp_path / "none.csv"), "--steps", "2", "--out", str(tmp_path)]) == 1
        assert (
            capsys.readouterr().err == f"m2helpers {command}: --out {tmp_path}: is a folder; give the name of a file\n"
        )


def test_a_reader_that_goes_away_hears_no_complaint():
    command = [sys.executable, "-m", "m2helpers", "flops", "--model", "Qwen/Qwen2.5-0.5B-Instruct"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        running.stdout.close()
        assert running.stderr.read() == b"" and running.wait() == 1


def test_wrong_usage_is_status_2():
    finished = subprocess.run([sys.executable, "-m", "m2helpers", "forecast"], capture_output=True, text=True)
    assert finished.returncode == 2 and "required" in finished.stderr


def test_no_command_is_status_2_with_the_list_of_them(capsys):
    assert main([]) == 2
    said = capsys.readouterr()
    assert not said.out and said.err.startswith("usage: m2helpers") and "forecast" in said.err


def test_the_version_is_the_packages(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"m2helpers {m2helpers.__version__}\n"


@pytest.mark.parametrize("encoding", ["ascii", "cp932", "cp437", "cp1251"])
def test_every_console_can_show_help_and_messages(encoding, tmp_path, monkeypatch):
    def said_by(*words):
        console = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        monkeypatch.setattr(sys, "stdout", console)
        try:
            status = main(words)
        except SystemExit as stopped:
            status = stopped.code
        console.flush()
        return status, console.buffer.getvalue().decode(encoding)

    for words in ["--help"], ["train", "--help"]:
        status, text = said_by(*words)
        assert status == 0 and "?" not in text and "usage: m2helpers" in text
    out = tmp_path / "Jäger – и добыча ×"
    status, text = said_by("simulate", "--systems", "10", "--out", str(out))
    assert status == 0 and "10 systems" in text and out.is_file()
    status, text = said_by("flops", "--model", "Qwen/Qwen2.5-0.5B-Instruct", "--train")
    assert status == 0 and "forward" in text


def test_the_console_script_is_this_main():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert pkgutil.resolve_name(project["scripts"]["m2helpers"]) is main


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_leaves_nothing_half_written_and_is_died_of(name, tmp_path):
    program = f"""
import os, signal, sys
from m2helpers.__main__ import _run
from m2helpers.files import atomic_path

def work():
    with atomic_path({str(tmp_path / "out.csv")!r}) as temporary:
        temporary.write_text("half")
        os.kill(os.getpid(), signal.{name})
        signal.pause()

signal.signal(signal.{name}, signal.SIG_DFL)
sys.exit(_run("forecast", work))
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60)
    assert ended.returncode == -getattr(signal, name) and ended.stderr == b"" and not os.listdir(tmp_path)


def test_ctrl_c_before_a_command_begins_is_one_line(monkeypatch, capsys):
    def interrupted(words):
        raise KeyboardInterrupt

    monkeypatch.setattr("m2helpers.__main__.parse", interrupted)
    assert main(["ledger"]) == 1
    assert capsys.readouterr().err == "m2helpers ledger: stopped before it began; nothing was done\n"
