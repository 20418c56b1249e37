"""From the words of a command line to a command, and to help that every console can show."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from m2helpers.cli.parser import COMMANDS, help_text, parse
from m2helpers.settings import STAGES, TrainSettings

HEAVY = ("torch", "transformers", "sklearn", "pandas", "scipy", "h5py", "numpy")


def _help(capsys, name):
    with pytest.raises(SystemExit) as stopped:
        parse([name, "--help"])
    assert stopped.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("name", COMMANDS)
def test_help_fits_80_columns_in_plain_ascii_and_explains_every_flag(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = _help(capsys, name)
    assert text.startswith(f"usage: m2helpers {name} [-h]")
    assert text.isascii() and "\x1b" not in text and max(map(len, text.splitlines())) <= 80
    for entry in re.split(r"\n  (?=--[a-z])", text)[1:]:
        flag, about = re.fullmatch(r"(--[a-z-]+)(?: [A-Z_,]+| {.*?})?\s+(.*)", entry, re.DOTALL).groups()
        assert re.match(r"[\w']", about), f"{flag} says nothing"


def test_the_list_of_commands_is_their_docstrings(capsys):
    text = " ".join(help_text().split())
    assert not capsys.readouterr().out
    for name, command in COMMANDS.items():
        assert f"- {name} {command.__doc__}" in text


def test_help_of_train_says_what_the_stages_have(capsys):
    text = " ".join(_help(capsys, "train").split())
    assert "A setting that is not given stays as the --stage of the base's plan has it." in text
    steps = " / ".join(str(stage.max_steps) for stage in STAGES.values())
    assert f"--max-steps INT Optimizer steps in all. (default: {steps})" in text
    assert "--batch-size INT Windows of text per optimizer step. (default: 4)" in text
    assert "--stage {initial,final,extended,amortised}" in text


def test_help_of_pretrain_shows_its_defaults(capsys):
    assert "Longest text, in tokens. (default: 1024)" in " ".join(_help(capsys, "pretrain").split())


@pytest.mark.slow
def test_help_and_parsing_import_nothing_heavy():
    program = f"""
import contextlib, sys
import m2helpers.__main__
from m2helpers.cli.parser import COMMANDS, help_text, parse
help_text()
for name in COMMANDS:
    with contextlib.suppress(SystemExit):
        parse([name, "--help"])
parse(["train", "--output-dir", "run"])
sys.exit(" ".join(name for name in {HEAVY} if name in sys.modules) or 0)
"""
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["nope"], "nope"),
        (["forecast", "x.csv", "--out", "y.csv"], "Required options"),
        (["train", "--output-dir", "run", "--stage", "last"], "invalid choice"),
        (["sweep", "everything"], "invalid choice"),
        (["flops", "--length", "x"], "Error parsing --length: invalid literal for int()"),
        (["flops", "--numeric-head", "2"], "invalid choice"),
        (["flops", "--train", "--infer"], "Arguments --train and --infer are not allowed together"),
        (["evaluate", "--model", "embedded", "--run", "run"], "--model and --run are not allowed together"),
        (["train", "--output-dir", "run", "--max-s", "3"], "--max-steps INT"),  # no abbreviations, but a suggestion
        (["ledger", "--json", "None", "--json"], "--json"),
    ],
)
def test_wrong_usage_is_status_2_and_says_what_is_wrong(words, complaint, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(words)
    said = capsys.readouterr()
    assert stopped.value.code == 2 and complaint in " ".join(said.err.split()) and not said.out


def test_values_are_read_as_the_settings_mean_them():
    words = "--target-modules q_proj,k_proj --learning-rate=1e-4 --rescale -1e-3 --numeric-head 1 --seed 1 --seed 2"
    settings = parse(["train", "--output-dir", "run", *words.split()]).settings
    assert settings.target_modules == ("q_proj", "k_proj")
    assert (settings.learning_rate, settings.rescale, settings.numeric_head) == (1e-4, -1e-3, 1)
    assert settings.seed == 2 and settings.max_steps is None  # the last one counts; not given


def test_defaults_are_what_they_were(monkeypatch):
    forecast = parse(["forecast", "--steps", "3", "own.csv", "--out", "out.csv"])  # the file may stand anywhere
    assert (forecast.file, forecast.out) == (Path("own.csv"), Path("out.csv"))
    assert (forecast.samples, forecast.seed, forecast.scale, forecast.run) == (0, 0, "own", None)
    assert (forecast.model, forecast.constrained) == ("embedded", False)
    flops = parse(["flops"])
    assert (flops.batch_size, flops.length, flops.lora_r, flops.target_modules) == (4, 512, 8, ("q_proj", "v_proj"))
    monkeypatch.setenv("M2_MODEL", "models/mine")
    assert parse(["ledger"]).model == parse(["train", "--output-dir", "run"]).model == "models/mine"


def test_every_setting_has_a_flag_of_its_name():
    given = vars(parse(["train", "--output-dir", "run"]).settings)
    assert list(given) == list(vars(TrainSettings())) and set(given.values()) == {None}
