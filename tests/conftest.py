"""Fixtures that several test files share: a tiny base model with random weights, and a small dataset.

What takes seconds to import is imported inside: the process that deals tests out to others needs none of it.
"""

import os
import re

os.environ["HF_HUB_OFFLINE"] = "1"  # no test reaches for the network
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ.pop("M2_MODEL", None)

import pytest
from hypothesis import settings

settings.register_profile("repeatable", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("repeatable")


def pytest_ignore_collect(collection_path, config):
    """A file that is slow as a whole is not even imported where slow tests are left out: some need what takes seconds to import."""
    if config.option.markexpr != "not slow" or collection_path.suffix != ".py":
        return None  # others decide
    slow = re.search(r"^pytestmark = \[?pytest\.mark\.slow", collection_path.read_text("utf-8"), re.M)
    return True if slow else None


TINY = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    initializer_range=0.3,  # large, so that what the model writes depends on what it read
)


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """No test wants more."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A base model of 20 thousand random weights, in hub format."""
    import torch
    from transformers import Qwen2ForCausalLM

    from m2helpers.models import embedded_config, embedded_tokenizer

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
    from m2helpers.models import load_base

    return lambda **options: load_base(str(tiny_folder), **options)


def _dataset(path, **settings):
    from m2helpers.data import load_dataset
    from m2helpers.simulator import SimulatorSettings, simulate, write_dataset

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


@pytest.fixture(scope="session")
def peft():
    """The library, for slow tests: importing it takes seconds."""
    import peft

    return peft


@pytest.fixture
def ramp(monkeypatch):
    """A model whose samples are the last values plus 1, 2, 3, ... hundredths of the text, and whose likeliest is the last."""

    import numpy as np

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
    import numpy as np
    import pandas as pd

    days = pd.date_range("2021-01-01", periods=n, freq="D")
    values = 2 + np.sin(np.arange(n) / 3)
    parts = [
        pd.DataFrame({"item": name, "day": days, "hare": values * i, "lynx": values + i})
        for i, name in ((1, "x"), (2, "y"))
    ]
    return pd.concat(parts, ignore_index=True)
