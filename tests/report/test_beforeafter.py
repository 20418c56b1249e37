"""The README's picture."""

from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np

from m2helpers.data import load_dataset
from m2helpers.evaluation.protocols import compared
from m2helpers.paths import checkpoint_folder
from m2helpers.report import beforeafter
from m2helpers.runs import read_config
from m2helpers.text import Codec


def test_a_forecast_that_is_right_lies_on_the_truth(monkeypatch):
    codec = Codec(**read_config(checkpoint_folder("embedded") / beforeafter.STAGE)["codec"])
    monkeypatch.setattr(beforeafter, "load_run", lambda folder: SimpleNamespace(codec=codec, base="after"))
    monkeypatch.setattr(beforeafter, "load_base", lambda name: "before")
    asked = []

    def paths(model, run, case):
        asked.append((model, case.context))
        text = codec.encode(load_dataset().part("test")[case.series])[case.start + beforeafter.CONTEXT :]
        return np.stack([compared(codec, text, 1, 2)[: beforeafter.STEPS]] * 3)

    monkeypatch.setattr(beforeafter, "_paths", paths)
    figure = beforeafter.before_after()
    assert [model for model, _ in asked] == ["before", "after"] and asked[0][1] == asked[1][1]
    for ax in figure.axes:
        lines = {line.get_label(): dict(zip(*line.get_data(), strict=True)) for line in ax.lines}
        for name in ("prey", "predator"):
            truth, median = lines[f"{name}, truth"], lines[f"{name}, median forecast"]
            assert len(median) == beforeafter.STEPS and len(truth) > len(median) + 5
            assert max(abs(truth[step] - value) for step, value in median.items()) <= codec.resolution
    plt.close(figure)
