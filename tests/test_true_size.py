"""Qwen2.5-0.5B at its true size, with random weights: a folder in hub format is loaded, trained on and forecast with."""

from dataclasses import replace

import pytest

from m2helpers.engine import losses
from m2helpers.experiments.bench import random_qwen
from m2helpers.forecasting import forecast
from m2helpers.lora import parameter_report
from m2helpers.models import embedded_tokenizer, load_base
from m2helpers.runs import load_run
from m2helpers.settings import TrainSettings
from m2helpers.training import train_lora

# One worker holds the model, where several run side by side.
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("true size")]
ONE_STEP = TrainSettings(lora_r=8, batch_size=1, max_steps=1, max_length=64, eval_windows=1, learning_rate=1e-4)


@pytest.fixture(scope="module")
def qwen_folder(tmp_path_factory):
    """Its architecture in bfloat16, about 1 GB. The tokenizer is ours, which gives numeric text the same ids."""
    folder = tmp_path_factory.mktemp("models") / "qwen"
    random_qwen().save_pretrained(folder)
    embedded_tokenizer().save_pretrained(folder)
    yield folder
    (folder / "model.safetensors").unlink()  # pytest keeps the folders of three runs


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """A ledger of its own, and chunks so short that the 63 scored positions of a window need several."""
    monkeypatch.setenv("M2_LEDGER", str(tmp_path / "ledger.sqlite"))
    monkeypatch.setattr(losses, "CHUNK", 16)


def test_a_step_a_validation_and_a_constrained_forecast(qwen_folder, small_data, tmp_path):
    base = load_base(str(qwen_folder))
    counts = parameter_report(base.model)
    assert (counts["base"], counts["head_bias"]) == (494_032_768, 151_936)
    result = train_lora(base, small_data, ONE_STEP, tmp_path / "run", progress=False)
    assert parameter_report(result.model)["lora"] == 540_672
    assert 11.5 < result.history["val_loss"].iloc[0] < 12.5  # 11.9 = ln(151,936) knows nothing; no chunk is left out
    base = result = None
    run = load_run(tmp_path / "run")
    (found,) = forecast(run.base, run.codec, [small_data.part("test")[0][:5]], 2, constrained=True)
    assert found.valid and found.values.shape == (2, 2)


def test_a_step_that_scores_numeric_characters_alone(qwen_folder, small_data):
    base = load_base(str(qwen_folder))
    result = train_lora(base, small_data, replace(ONE_STEP, numeric_head=1), progress=False)
    assert 2.3 < result.history["val_loss"].iloc[0] < 3.3  # 2.6 = ln(14) knows nothing
    moved = set(result.model.lm_head.bias.nonzero().flatten().tolist())
    assert moved == set(base.tokenizer("0123456789.-,;")["input_ids"])
