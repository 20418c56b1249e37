"""Where output goes: what cannot be written is refused before work begins, in every command that writes."""

import sys
from dataclasses import fields

import pytest

from m2helpers.__main__ import main
from m2helpers.cli.parser import COMMANDS

NOWHERE = "/proc/m2helpers"  # a file system that takes no file, of root neither
WRITES = {
    "simulate": ["--out"],
    "encode": ["--output-dir"],
    "pretrain": ["--tokens 100000 --output-dir"],
    "train": ["--output-dir"],
    "instruct": ["--output-dir"],
    "sweep": ["grid --output-dir"],
    "experiments": ["--output-dir"],
    "evaluate": ["--json"],
    "calibrate": ["--json"],
    "floor": ["--json"],
    "forecast": ["own.csv --steps 2 --out", "own.csv --steps 2 --out own-2.csv --plot"],
    "backtest": ["own.csv --steps 2 --out", "own.csv --steps 2 --plot"],
    "export": ["--run checkpoint/embedded/final --output-dir"],
    "flops": ["--json", "--plan embedded --json"],
    "ledger": ["--json", "--csv"],
    "bench": ["decode --json", "classic --json"],
}
LINES = [f"{command} {flags}" for command, several in WRITES.items() for flags in several]


def test_every_output_flag_is_among_them():
    for name, command in COMMANDS.items():
        flags = {f"--{f.name.replace('_', '-')}" for f in fields(command)} & {
            "--out", "--output-dir", "--json", "--csv", "--plot",
        }  # fmt: skip
        assert flags == {line.split()[-1] for line in WRITES.get(name, [])}, name


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux has a file system that takes no file")
@pytest.mark.parametrize("line", LINES)
def test_a_place_that_takes_nothing_is_refused_before_work_begins(line, tmp_path, monkeypatch, capsys):
    def begun(*_, **__):
        raise AssertionError("the work began")

    for name in (
        "data.load_dataset",
        "models.load_base",
        "models.fetch_base",
        "series.read_table",
        "simulator.simulate",
    ):
        if not line.startswith(("flops", "ledger")):  # which take a second, and write before they print
            monkeypatch.setattr(f"m2helpers.{name}", begun)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("M2_LEDGER", str(tmp_path / "ledger.sqlite"))
    (tmp_path / "own.csv").write_text("a,b\n" + "1.5,2.5\n2.5,1.5\n" * 20)
    ending = {"--out": ".csv", "--plot": ".png"}.get(line.split()[-1], "")
    assert main([*line.split(), place := NOWHERE + ending]) == 1
    said = capsys.readouterr()
    (told,) = said.err.splitlines()
    assert told.startswith(f"m2helpers {line.split()[0]}: ") and "cannot be written" in told
    assert not said.out and place in told
    assert {path.name for path in tmp_path.iterdir()} == {"own.csv"}
