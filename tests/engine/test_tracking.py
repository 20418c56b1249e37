"""Trackers: what TensorBoard is told, and what is said when a tracker is not there."""

import pytest

from m2helpers.engine.tracking import tracked
from m2helpers.files import UserError
from m2helpers.settings import TrainSettings
from m2helpers.training import train_lora

QUICK = TrainSettings(
    lora_r=2, learning_rate=1e-2, batch_size=3, max_steps=4, max_length=48, eval_steps=2, eval_windows=5
)


@pytest.mark.slow
def test_tensorboard_is_told_every_loss(tiny_base, small_data, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # takes seconds

    result = train_lora(tiny_base(), small_data, QUICK, tmp_path / "run", progress=False, track="tensorboard")
    events = EventAccumulator(str(tmp_path / "run" / "logs" / "m2helpers")).Reload()
    assert [e.step for e in events.Scalars("loss")] == [1, 2, 3, 4]
    told = [(e.step, e.value) for e in events.Scalars("val_loss")]
    assert told == [
        (step, pytest.approx(loss, rel=1e-6)) for step, loss in result.history[["step", "val_loss"]].to_numpy()
    ]


def test_nothing_is_written_unless_asked(tmp_path):
    with tracked(None, tmp_path / "run", {}) as log:
        log({"loss": 1.0}, 1)
    assert not list(tmp_path.iterdir())


def test_a_tracker_that_is_not_there(tiny_base, small_data, tmp_path, monkeypatch):
    with (
        pytest.raises(UserError, match="track 'mlflow': choose from tensorboard, wandb"),
        tracked("mlflow", tmp_path, {}),
    ):
        pass
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", list)
    with (
        pytest.raises(UserError, match="package is not installed; run 'pip install wandb'"),
        tracked("wandb", tmp_path, {}),
    ):
        pass
    with pytest.raises(UserError, match="track needs the output_dir"):
        train_lora(tiny_base(), small_data, QUICK, progress=False, track="tensorboard")


def test_switches_are_told_as_numbers_and_names_as_text(tmp_path):
    settings = {"numeric_head": True, "random_start": False, "rescale": 0.5, "target_modules": ("q_proj", "v_proj")}
    with tracked("tensorboard", tmp_path / "run", settings):
        pass
    (told,) = (tmp_path / "run" / "logs").rglob("hparams.yml")
    lines = ["numeric_head: 1", "random_start: 0", "rescale: 0.5", "target_modules: ('q_proj', 'v_proj')"]
    assert told.read_text().splitlines() == lines
