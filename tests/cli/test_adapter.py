"""An adapter that `peft` trained, given by ``--adapter``."""

import json

import numpy as np
import pandas as pd
import pytest
import torch

from m2helpers import paths
from m2helpers.__main__ import main
from m2helpers.forecasting import forecast_table
from m2helpers.ledger import Ledger
from m2helpers.runs import load_adapted
from m2helpers.series import table_of
from m2helpers.simulator import SimulatorSettings, simulate, write_dataset

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")]  # peft's
VALUES = np.sin(np.arange(30))[:, None] + 2


@pytest.fixture
def adapter(peft, tiny_base, tmp_path):
    """What `peft` saves of a LoRA whose matrices were moved."""
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(tiny_base(head_bias=False).model, config)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.2 * torch.randn(p.shape))
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.fixture
def series(tmp_path):
    pd.DataFrame(VALUES, columns=["a"]).to_csv(tmp_path / "series.csv", index=False)
    return str(tmp_path / "series.csv")


def test_forecast_is_that_of_peft(peft, adapter, series, tiny_folder, tiny_base, tmp_path, monkeypatch):
    monkeypatch.setenv("M2_LEDGER", str(tmp_path / "ledger.sqlite"))
    out = tmp_path / "out.csv"
    command = ["forecast", series, "--model", str(tiny_folder), "--steps", "3", "--constrained", "--out", str(out)]
    assert main([*command, "--adapter", str(adapter)]) == 0
    (entry,) = Ledger(tmp_path / "ledger.sqlite").entries()
    assert (entry["run"], entry["stage"]) == ("adapter", "adapter") and len(entry["settings_sha256"]) == 64

    base, table = tiny_base(), table_of(pd.DataFrame(VALUES, columns=["a"]))
    (plain,) = forecast_table(base, table, 3, constrained=True).outlooks[0].paths
    peft.PeftModel.from_pretrained(base.model, adapter).merge_and_unload()  # changes the layers of base.model in place
    (theirs,) = forecast_table(base, table, 3, constrained=True).outlooks[0].paths
    np.testing.assert_allclose(pd.read_csv(out)[["a"]], theirs, atol=1e-4)  # the file has a digit more than the text
    assert not np.array_equal(theirs, plain)


def test_evaluate_records_the_adapter(adapter, tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "BASELINE_CACHE", tmp_path / "cache")
    settings = SimulatorSettings(systems=20, seed=1)
    time, trajectories, _ = simulate(settings)
    write_dataset(tmp_path / "data.h5", time, trajectories, settings)
    command = ["evaluate", "--model", str(tiny_folder), "--adapter", str(adapter), "--data", str(tmp_path / "data.h5")]
    options = ["--context", "128", "--split", "validation", "--json", str(tmp_path / "metrics.json")]
    assert main([*command, *options]) == 0
    (row,) = json.loads((tmp_path / "metrics.json").read_text())
    assert row["run"] == str(adapter) and row["model"] == str(tiny_folder)


def test_each_adapter_has_an_identity(adapter, tiny_folder, tiny_base):
    base = load_adapted(str(tiny_folder), adapter)
    assert base.sha256 == tiny_base().sha256  # the base's own
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 4}))
    assert load_adapted(str(tiny_folder), adapter).settings_sha256 not in ("", base.settings_sha256)


@pytest.mark.parametrize(
    "options, said",
    [
        (["--run", "{adapter}"], "holds a peft adapter, not a run; give --model BASE --adapter {adapter}"),
        (
            ["--model", "{adapter}"],
            "holds a peft adapter, not a base; give 'forecast' or 'evaluate' --model BASE --adapter",
        ),
        (
            ["--run", "{adapter}", "--adapter", "{adapter}"],
            "--adapter goes with --model; a run has an adapter of its own",
        ),
        (["--model", "{base}", "--adapter", "{base}"], "no adapter (adapter_config.json) there"),
        (["--model", "{base}", "--adapter", "{base}/none"], "no adapter (adapter_config.json) there"),
    ],
)
def test_the_wrong_use_names_the_right_one(adapter, series, tiny_folder, tmp_path, capsys, options, said):
    names = {"adapter": adapter, "base": tiny_folder}
    command = ["forecast", series, "--steps", "2", "--out", str(tmp_path / "out.csv")]
    assert main([*command, *(option.format(**names) for option in options)]) == 1
    *_, error = capsys.readouterr().err.splitlines()  # what was read of the table comes before it
    assert said.format(**names) in error and not (tmp_path / "out.csv").exists()


def test_an_adapter_is_refused_before_its_base_is_read(adapter, series, tmp_path, capsys):
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    command = ["forecast", series, "--steps", "2", "--out", str(tmp_path / "out.csv"), "--adapter", str(adapter)]
    assert main([*command, "--model", "no/such-base"]) == 1
    assert "use_dora is not supported here" in capsys.readouterr().err
