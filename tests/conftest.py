"""Fixtures that several test files share: a tiny base model with random weights, and a small dataset."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # no test reaches for the network
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ.pop("M2_MODEL", None)

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import settings
from transformers import Qwen2ForCausalLM

from m2helpers.data import load_dataset
from m2helpers.models import embedded_config, embedded_tokenizer, load_base
from m2helpers.simulator import SimulatorSettings, simulate, write_dataset

torch.set_num_threads(1)
settings.register_profile("repeatable", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("repeatable")

TINY = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    initializer_range=0.3,  # large, so that what the model writes depends on what it read
)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A base model of 20 thousand random weights, in hub format."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Qwen2ForCausalLM(embedded_config(**TINY))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias"):  # zero in a new model, which would hide a mistake
                p.copy_(torch.linspace(-1, 1, p.numel()))
    model.save_pretrained(folder)
    embedded_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def tiny_base(tiny_folder):
    """Makes a fresh tiny base at each call."""
    return lambda **options: load_base(str(tiny_folder), **options)


def _dataset(path, **settings):
    settings = SimulatorSettings(systems=12, **settings)
    time, trajectories, _ = simulate(settings)
    write_dataset(path, time, trajectories, settings)
    return load_dataset(path)


@pytest.fixture(scope="session")
def small_data(tmp_path_factory):
    """Twelve simulated systems of 20 steps, read from a file in the course's schema."""
    return _dataset(tmp_path_factory.mktemp("data") / "small.h5", steps=20, t_max=40.0)


@pytest.fixture(scope="session")
def long_data(tmp_path_factory):
    """Twelve simulated systems of 100 steps."""
    return _dataset(tmp_path_factory.mktemp("data") / "long.h5")


@pytest.fixture
def ramp(monkeypatch):
    """A model whose samples are the last values plus 1, 2, 3, ... hundredths of the text, and whose likeliest is the last."""

    def sample(base, codec, series, steps, n_samples, **_):
        ahead = [np.repeat(values[-1:], steps, axis=0) for values in series]
        return [np.stack([values + 0.01 * i for i in range(n_samples)]) for values in ahead]

    def forecast(base, codec, series, steps, **_):
        return [type("F", (), {"values": np.repeat(values[-1:], steps, axis=0)}) for values in series]

    monkeypatch.setattr("m2helpers.forecasting.tables.sample_many", sample)
    monkeypatch.setattr("m2helpers.forecasting.tables.forecast", forecast)


@pytest.fixture
def long():
    """Makes a table of two series of two variables, one below the other."""
    return _long


def _long(n=20):
    days = pd.date_range("2021-01-01", periods=n, freq="D")
    values = 2 + np.sin(np.arange(n) / 3)
    parts = [
        pd.DataFrame({"item": name, "day": days, "hare": values * i, "lynx": values + i})
        for i, name in ((1, "x"), (2, "y"))
    ]
    return pd.concat(parts, ignore_index=True)
