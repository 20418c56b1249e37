"""Fine-tuning and run folders: one seed one result, stops and resumes, the best weights, padding, and what it cost."""

import csv
import json
import os
import shutil
import signal
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen2ForCausalLM, Qwen3Config

from m2helpers.data import load_dataset
from m2helpers.engine.loop import Stopped
from m2helpers.engine.losses import CHUNK, Diverged
from m2helpers.engine.windows import pick, text_windows
from m2helpers.files import UserError, read_json
from m2helpers.flops.account import CAP, forward_account
from m2helpers.flops.costs import Cost, batch_costs
from m2helpers.forecasting import forecast
from m2helpers.ledger import CapReached, Ledger
from m2helpers.lora import lora_layers, parameter_report, trainable_parameters
from m2helpers.models import Base, add_head_bias, embedded_config, embedded_tokenizer, load_base
from m2helpers.paths import EMBEDDED_BASE
from m2helpers.runs import load_run, settings_sha256
from m2helpers.settings import STAGES, TrainSettings
from m2helpers.simulator import Law, SimulatorSettings, draw_parameters
from m2helpers.text import Codec, fit_scale, numeric_tokens
from m2helpers.training import run as runner
from m2helpers.training import steps as stepping
from m2helpers.training import train_lora

QUICK = TrainSettings(
    lora_r=2, learning_rate=1e-2, batch_size=3, max_steps=7, max_length=48, eval_steps=2, save_steps=3, eval_windows=5
)
COLUMNS = ["step", "loss", "val_loss", "learning_rate", "tokens_per_second", "flops"]
STEADY = [name for name in COLUMNS if name != "tokens_per_second"]
FILES = ["README.md", "adapter_config.json", "adapter_model.safetensors", "config.json", "history.csv"]
IDS = torch.arange(10, 27)[None]


@torch.no_grad()
def _logits(model):
    return model.eval()(IDS).logits


def _weights(model):
    return {name: p.detach().clone() for name, p in trainable_parameters(model).items()}


def _same(first, second):
    return first.keys() == second.keys() and all(torch.equal(p, second[name]) for name, p in first.items())


@pytest.fixture
def train(tiny_base, small_data):
    """Trains a fresh tiny base on the small dataset."""
    return lambda settings=QUICK, *args, **kwargs: train_lora(
        tiny_base(), small_data, settings, *args, **dict(progress=False) | kwargs
    )


@pytest.fixture
def stop_in_step_six(train, monkeypatch):
    """Trains into a folder and is interrupted in step 6, between two saves."""

    def stopped(folder, **options):
        steps, loss = [], stepping._loss

        def stop(base, batch, *rest):
            steps.append(base.model.training)
            if sum(steps) == 6:
                raise KeyboardInterrupt
            return loss(base, batch, *rest)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(stepping, "_loss", stop)
            train(QUICK, folder, **options)

    return stopped


@pytest.fixture
def stop_after_a_save(train, monkeypatch):
    """Trains into a folder and is interrupted right after the first save, or a later one."""

    def stopped(folder, settings=QUICK, saves=1):
        done, save = [], runner.save_state

        def stop(*args):
            save(*args)
            done.append(args)
            if len(done) == saves:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(runner, "save_state", stop)
            train(settings, folder)

    return stopped


@pytest.fixture(scope="module")
def run(tiny_folder, small_data, tmp_path_factory):
    """A finished run: its folder and its result."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    return folder, train_lora(load_base(str(tiny_folder)), small_data, QUICK, folder, progress=False)


# ---------------------------------------------------------------- one seed, one result


def test_one_seed_gives_one_result(train, run):
    again = train()  # and without a folder
    assert _same(_weights(again.model), _weights(run[1].model))
    assert again.history[STEADY].equals(run[1].history[STEADY])


@pytest.mark.parametrize("change", [dict(seed=1), dict(lora_dropout=0.3), dict(learning_rate=2e-2)])
def test_another_setting_gives_another_result(train, run, change):
    assert not _same(_weights(train(replace(QUICK, **change)).model), _weights(run[1].model))


@pytest.mark.slow
def test_training_lowers_the_loss_and_changes_only_what_is_trained(train, tiny_base):
    result = train(replace(QUICK, max_steps=24, eval_steps=4, learning_rate=3e-2))
    assert result.history["val_loss"].iloc[-1] < 0.9 * result.history["val_loss"].iloc[0]
    trained = trainable_parameters(result.model)
    now = {n.replace(".base.", "."): p for n, p in result.model.named_parameters() if n not in trained}
    before = {n: p for n, p in tiny_base().model.named_parameters() if n != "lm_head.bias"}
    assert _same(before, now)
    assert result.model.lm_head.bias.any() and all(x.lora_B.weight.any() for _, x in lora_layers(result.model))


@pytest.mark.slow
def test_the_average_is_judged_and_kept_and_leaves_training_alone(train, tmp_path, stop_after_a_save, monkeypatch):
    """Worked out again from the weights after every step; a stop in between changes nothing."""
    trained, judged = {0: [], 0.5: []}, []

    def validate(base, *_):
        judged.append(_weights(base.model))
        return 1 / len(judged), Cost()

    def step(work, bill):
        spent = one(work, bill)
        trained[work.settings.average].append({name: p.detach().clone() for name, p in work.parameters.items()})
        return spent

    one = stepping.Training.step
    monkeypatch.setattr(stepping, "_validate", validate)
    monkeypatch.setattr(stepping.Training, "step", step)
    train()
    judged.clear()
    averaged = replace(QUICK, average=0.5)
    kept = train(averaged)
    assert all(map(_same, trained[0], trained[0.5]))  # the average follows, and does not lead
    expected = trained[0.5][0]
    for weights in trained[0.5][1:]:
        expected = {name: 0.5 * expected[name] + 0.5 * p for name, p in weights.items()}
    for name, p in _weights(kept.model).items():
        torch.testing.assert_close(p, expected[name])
    assert _same(judged[-1], _weights(kept.model))

    stop_after_a_save(tmp_path, averaged)
    assert _same(_weights(train(averaged, tmp_path, resume=True).model), _weights(kept.model))


# ---------------------------------------------------------------- stopping and resuming


def test_a_stopped_run_goes_on_as_if_it_had_not_been(train, run, tmp_path, stop_after_a_save):
    """Stopped right after the save at step 3, in the middle between two validations, with dropout on."""

    folder = tmp_path / "run"
    stop_after_a_save(folder)
    assert (folder / "state.safetensors").exists() and not (folder / "history.csv").exists()
    resumed = train(QUICK, folder, resume=True)

    whole_folder, whole = run
    assert _same(_weights(resumed.model), _weights(whole.model))
    assert resumed.history[STEADY].equals(whole.history[STEADY])
    for name in ("adapter_model.safetensors", "adapter_config.json", "config.json"):
        assert (folder / name).read_bytes() == (whole_folder / name).read_bytes(), name
    assert sorted(p.name for p in folder.iterdir()) == FILES


@pytest.mark.slow
def test_a_run_stopped_between_saves_goes_on_from_the_last(train, run, tmp_path, stop_in_step_six):
    """Stopped at step 5, after a validation that the state of step 3 does not know of."""
    folder = tmp_path / "run"
    stop_in_step_six(folder)
    with pytest.raises(UserError, match="not finished; go on with the command that began it, and --resume"):
        load_run(folder)
    assert _same(_weights(train(QUICK, folder, resume=True).model), _weights(run[1].model))


@pytest.mark.slow
def test_an_augmented_and_averaged_run_goes_on_as_if_it_had_not_been_stopped(train, tmp_path, stop_after_a_save):
    """Its windows are drawn from the seed and the place alone, and the average comes back with the weights."""
    settings = replace(QUICK, rescale=0.5, random_start=1, average=0.5)
    stop_after_a_save(tmp_path, settings)
    resumed, whole = train(settings, tmp_path, resume=True), train(settings)
    assert _same(_weights(resumed.model), _weights(whole.model))
    assert resumed.history[STEADY].equals(whole.history[STEADY])


@pytest.mark.slow
def test_a_run_whose_last_save_is_damaged_ends_as_if_it_had_not_been(train, run, tmp_path, stop_after_a_save):
    """Stopped after the save at step 6, which cannot be read: it goes on from the one at step 3."""
    folder, (whole_folder, whole) = tmp_path / "run", run
    stop_after_a_save(folder, saves=2)
    last = folder / "state.safetensors"
    last.write_bytes(last.read_bytes()[:-1])
    with pytest.warns(UserWarning, match="resuming from the save before it, step 3"):
        resumed = train(QUICK, folder, resume=True)
    assert _same(_weights(resumed.model), _weights(whole.model))
    assert resumed.history[STEADY].equals(whole.history[STEADY])
    assert sorted(p.name for p in folder.iterdir()) == FILES
    assert (folder / "adapter_model.safetensors").read_bytes() == (
        whole_folder / "adapter_model.safetensors"
    ).read_bytes()


@pytest.mark.slow
def test_a_run_stopped_before_its_first_save_starts_over(train, run, tmp_path, monkeypatch):
    """Only its settings are there: the folder is neither finished nor to be resumed."""
    folder = tmp_path / "run"

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(runner, "save_state", stop)
        train(QUICK, folder)
    assert [p.name for p in folder.iterdir()] == ["config.json"]
    with pytest.raises(UserError, match="stopped before its first save; train it again"):
        load_run(folder)
    with pytest.raises(UserError, match="nothing to resume"):
        train(QUICK, folder, resume=True)
    assert _same(_weights(train(QUICK, folder).model), _weights(run[1].model))


@pytest.mark.slow
@pytest.mark.parametrize("during", ["a step", "a validation"])
def test_sigterm_saves_and_stops_within_one_step(train, run, tmp_path, monkeypatch, during):
    """After step 4 of 7, or in the validation that follows it, which is then still due."""
    folder, loss, steps = tmp_path / "run", stepping._loss, []

    def ask(base, batch, *rest):
        steps.append(base.model.training)
        if steps.count(True) == 4 and steps[-1] == (during == "a step") and steps[-2:] != [False, False]:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss(base, batch, *rest)

    with monkeypatch.context() as patch, pytest.raises(Stopped, match="run: stopped at step 4 of 7; --resume goes on"):
        patch.setattr(stepping, "_loss", ask)
        train(QUICK, folder)
    assert steps[-1] == (during == "a step")  # the validation was not carried to its end
    resumed = train(QUICK, folder, resume=True)
    assert _same(_weights(resumed.model), _weights(run[1].model))
    assert resumed.history[STEADY].equals(run[1].history[STEADY])


def test_a_stop_without_a_folder_says_that_nothing_was_saved(train, monkeypatch):
    monkeypatch.setattr(stepping.Training, "validate", lambda *_: os.kill(os.getpid(), signal.SIGINT) or Cost())
    with pytest.raises(Stopped, match=r"unsaved: stopped at step 2 of 7$"):
        train()


# ---------------------------------------------------------------- the best weights


def test_the_best_weights_by_validation_are_kept(train, tmp_path, monkeypatch):
    losses, seen = iter([3.0, 1.0, 2.0, 1.0]), []

    def validate(base, *_):
        seen.append(_weights(base.model))
        return next(losses), Cost()

    monkeypatch.setattr(stepping, "_validate", validate)
    result = train(QUICK, tmp_path / "run")
    assert result.history["step"].tolist() == [2, 4, 6, 7]
    assert _same(_weights(result.model), seen[1]) and not _same(seen[1], seen[3])
    kept = load_run(tmp_path / "run", merged=False).base.model
    assert _same(_weights(kept), seen[1])
    assert "1.0000 nats a token, at step 4" in (tmp_path / "run" / "README.md").read_text()


def test_the_kept_weights_have_the_lowest_recorded_loss(run, tiny_base, small_data):
    folder, result = run
    base = load_run(folder, merged=False).base
    codec = Codec(fit_scale(small_data.part("train")))
    windows = text_windows(small_data.part("validation"), codec, base.tokenizer, QUICK.max_length)
    chosen = np.random.default_rng(0).permutation(len(windows))[: QUICK.eval_windows]
    val_loss, _ = stepping._validate(base, QUICK, [windows[i] for i in chosen], lambda shape: Cost())
    assert val_loss == result.history["val_loss"].min()


def test_the_best_weights_survive_a_stop(train, tmp_path, stop_after_a_save, monkeypatch):
    """The best validation was before the stop, and nothing after it was better."""
    losses, seen = iter([1.0, 2.0, 3.0, 4.0]), []

    def validate(base, *_):
        seen.append(_weights(base.model))
        return next(losses), Cost()

    monkeypatch.setattr(stepping, "_validate", validate)
    stop_after_a_save(tmp_path)
    result = train(QUICK, tmp_path, resume=True)
    assert result.history["val_loss"].tolist() == [1.0, 2.0, 3.0, 4.0]
    assert _same(_weights(result.model), seen[0])
    assert _same(_weights(load_run(tmp_path, merged=False).base.model), seen[0])


@pytest.mark.slow
def test_a_bfloat16_base_trains_and_forecasts(tiny_folder, small_data):
    """The updates and the bias stay in float32, move, and bring about what they do on a float32 base."""
    results = {
        dtype: train_lora(load_base(str(tiny_folder), dtype=dtype), small_data, QUICK, progress=False)
        for dtype in ("float32", "bfloat16")
    }
    trained = trainable_parameters(results["bfloat16"].model)
    assert {p.dtype for p in trained.values()} == {torch.float32} and all(p.any() for p in trained.values())
    ours, theirs = (r.history["val_loss"].to_numpy() for r in results.values())
    np.testing.assert_allclose(ours, theirs, rtol=0.02)
    base = load_base(str(tiny_folder), dtype="bfloat16")
    found = forecast(base, Codec(1.0), list(small_data.part("test")), 2, constrained=True)
    assert all(f.valid for f in found)


def test_a_loss_that_is_no_number_is_refused(train, tmp_path, monkeypatch):
    monkeypatch.setattr(stepping, "_loss", lambda base, *_: (base.model.lm_head.bias.sum() * float("nan"), (1, 2)))
    with pytest.raises(Diverged, match="step 1: the loss is no longer a number; use a smaller learning_rate") as error:
        train(QUICK)
    assert isinstance(error.value, UserError)


# ---------------------------------------------------------------- what it spends


@pytest.fixture
def ledger(tmp_path, monkeypatch):
    """An empty ledger of its own, and the cap that the next run finds."""

    def use(cap=CAP):
        opened = Ledger(tmp_path / "ledger.sqlite", cap)
        for module in ("training.run", "training.steps", "forecasting.generation"):
            monkeypatch.setattr(f"m2helpers.{module}.default_ledger", lambda base: opened)
        return opened

    use()
    return use


def test_every_step_and_validation_is_charged(train, tmp_path, ledger):
    result = train(QUICK, tmp_path / "run", stage="initial")
    entries = ledger().entries()
    assert [e["kind"] for e in entries] == ["train", "validate"] * 3  # three save intervals: to steps 3, 6 and 7
    assert sum(e["flops"] for e in entries) == result.history["flops"].iloc[-1]
    recorded = read_json(tmp_path / "run" / "config.json")
    assert recorded["stage"] == "initial"
    assert {(e["run"], e["stage"], e["settings_sha256"], e["state"]) for e in entries} == {
        ("run", "initial", recorded["settings_sha256"], "settled")
    }
    assert all(e["flops_course"] > e["flops"] for e in entries)  # grouped-query attention


def test_a_step_that_diverges_is_charged(train, tiny_base, monkeypatch, ledger):
    """Step 5 does, in the second save interval, after the validation of step 4: it was computed like any other."""
    loss, batches = stepping._loss, []

    def diverge(base, *rest):
        value, shape = loss(base, *rest)
        if base.model.training:
            batches.append(shape)
        return value * (float("nan") if len(batches) == 5 else 1), shape

    monkeypatch.setattr(stepping, "_loss", diverge)
    with pytest.raises(Diverged, match="step 5: the loss is no longer a number"):
        train(QUICK)
    step_cost, _ = batch_costs(tiny_base().model.config, QUICK.adaptation)
    costs = [step_cost(shape).flops for shape in batches]
    entries = ledger().entries()
    assert [(e["kind"], e["state"]) for e in entries] == [("train", "settled"), ("validate", "settled")] * 2
    assert [e["flops"] for e in entries if e["kind"] == "train"] == [sum(costs[:3]), sum(costs[3:])]


@pytest.mark.slow
def test_at_the_cap_a_run_stops_and_can_go_on(train, run, tmp_path, ledger):
    """The cap leaves room for the first save interval and not for the second."""
    train(QUICK, tmp_path / "whole")
    first = sum(e["flops"] for e in ledger().entries()[:2])
    ledger().where.unlink()
    small = ledger(int(1.6 * first))
    folder = tmp_path / "run"
    with pytest.raises(
        CapReached, match=r"stopped at step 3 of 7; --resume goes on from step 3\. .* FLOPs are needed next"
    ):
        train(QUICK, folder)
    assert first == small.spent() < small.cap and (folder / "state.safetensors").exists()
    with pytest.raises(CapReached, match="stopped at step 3 of 7"):
        train(QUICK, folder, resume=True)
    assert small.spent() == first
    ledger(CAP)
    assert _same(_weights(train(QUICK, folder, resume=True).model), _weights(run[1].model))


@pytest.mark.slow
def test_repeated_steps_are_charged_again(train, tmp_path, ledger, stop_in_step_six):
    """Stopped in step 6: steps 4 and 5 are on the bill, and once more after the resume."""
    stop_in_step_six(tmp_path / "run")
    before = ledger().spent()
    result = train(QUICK, tmp_path / "run", resume=True)
    trained = [e["tokens"] for e in ledger().entries() if e["kind"] == "train"]
    assert len(trained) == 4 and ledger().spent() > result.history["flops"].iloc[-1] > before


def test_forecasts_are_charged(tiny_base, small_data, ledger):
    base, codec = tiny_base(), Codec(fit_scale(small_data.part("train")))
    results = forecast(base, codec, list(small_data.part("test")), 2, batch_size=2)
    entries = ledger().entries()
    assert {e["kind"] for e in entries} == {"generate"} and entries[0]["stage"] == "untrained"
    assert sum(e["flops"] for e in entries) == sum(r.flops for r in results)
    ledger(ledger().spent() + 1000)
    with pytest.raises(CapReached, match="FLOPs are needed next"):
        forecast(base, codec, list(small_data.part("test")), 2)
    ledger(CAP)
    spent = ledger().spent()
    stepping.series_loss(base, codec, small_data.part("validation"), length=64)
    assert ledger().entries()[-1]["kind"] == "validate" and ledger().spent() > spent


# ---------------------------------------------------------------- the run folder


def test_a_run_folder_holds_what_the_design_says(run, small_data, tiny_base):
    folder, result = run
    assert sorted(p.name for p in folder.iterdir()) == FILES
    with open(folder / "history.csv", newline="") as stream:
        rows = list(csv.reader(stream))
    assert rows[0] == COLUMNS == list(result.history.columns)
    assert [int(row[0]) for row in rows[1:]] == [2, 4, 6, 7]
    assert [float(row[2]) for row in rows[1:]] == result.history["val_loss"].tolist()
    assert [float(row[3]) for row in rows[1:]] == [QUICK.rate(step) for step in (1, 3, 5, 6)]

    config = read_json(folder / "config.json")
    assert config["settings"] == json.loads(json.dumps(asdict(QUICK)))
    base = tiny_base()
    assert config["data_sha256"] == small_data.sha256 and config["base_sha256"] == base.sha256
    assert config["scale"] == config["codec"]["scale"] == fit_scale(small_data.part("train"))
    assert config["data"] == "small.h5" and set(config["versions"]) == {"python", "torch", "transformers"}

    card = (folder / "README.md").read_text()
    counts = parameter_report(result.model)
    assert f"| {counts['trainable']:,} ({counts['lora']:,} LoRA, 259 head bias) of {counts['base']:,} |" in card
    assert small_data.sha256[:16] in card and "library_name: peft" in card


def test_the_settings_hash_covers_settings_data_and_base_only(run, small_data, tiny_base):
    folder, _ = run
    base, codec = tiny_base(), Codec(1.0)
    recorded = read_json(folder / "config.json")["settings_sha256"]
    describe = runner.describe
    assert describe(base, small_data, QUICK, codec, "another stage")["settings_sha256"] == recorded
    elsewhere = replace(base, name="other/place")
    assert describe(elsewhere, replace(small_data, path="b.h5"), QUICK, codec, "trial")["settings_sha256"] == recorded
    for b, d, s in (
        (replace(base, sha256="0"), small_data, QUICK),
        (base, replace(small_data, sha256="0"), QUICK),
        (base, small_data, replace(QUICK, seed=1)),
    ):
        assert describe(b, d, s, codec, "trial")["settings_sha256"] != recorded


def test_a_run_loads_as_it_was(run, small_data):
    folder, result = run
    apart, merged = load_run(folder, merged=False), load_run(folder)
    assert torch.equal(_logits(apart.base.model), _logits(result.model))
    torch.testing.assert_close(_logits(merged.base.model), _logits(result.model), atol=1e-5, rtol=1e-5)
    assert merged.settings == QUICK and merged.codec == Codec(fit_scale(small_data.part("train")), 2)
    assert not merged.base.model.training and merged.config["base"] == merged.base.name


def test_without_a_folder_nothing_is_written(train, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train(replace(QUICK, max_steps=2))
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- refusals


def test_folders_that_hold_something_else_are_refused(run, train, tiny_base, small_data, tmp_path):
    folder, _ = run
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(UserError, match=f"{folder}: holds a finished run; choose another folder"):
        train(QUICK, folder)
    with pytest.raises(UserError, match=r"nothing to resume \(no saved state\)"):
        train(QUICK, folder, resume=True)
    with pytest.raises(UserError, match="nothing to resume"):
        train(QUICK, tmp_path / "none", resume=True)
    with pytest.raises(UserError, match="resume needs the output_dir"):
        train(QUICK, resume=True)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert not (tmp_path / "none").exists()


def test_a_model_is_not_overwritten(train, tiny_folder, tmp_path):
    model = shutil.copytree(tiny_folder, tmp_path / "model")
    with pytest.raises(UserError, match="model: holds a model; choose another folder"):
        train(QUICK, model)
    assert (model / "config.json").read_bytes() == (tiny_folder / "config.json").read_bytes()


@pytest.mark.slow
def test_a_run_knows_its_base_from_any_directory(tiny_folder, small_data, tmp_path, monkeypatch):
    shutil.copytree(tiny_folder, tmp_path / "models" / "tiny")
    monkeypatch.chdir(tmp_path)
    train_lora(load_base("models/tiny"), small_data, QUICK, Path("run"), progress=False)
    monkeypatch.chdir("/")
    assert load_run(tmp_path / "run").base.sha256 == load_base(str(tiny_folder)).sha256
    assert read_json(tmp_path / "run" / "adapter_config.json")["base_model_name_or_path"] == str(
        tmp_path / "models" / "tiny"
    )


@pytest.fixture
def law():
    return Law(draw_parameters(SimulatorSettings(systems=30)).to_numpy(), 2.0, 20)


@pytest.mark.slow
def test_a_run_that_is_told_the_law_trains_on_no_recorded_series(train, law, small_data, tmp_path, monkeypatch):
    settings = replace(QUICK, random_start=True)
    seen, window = [], stepping.augmented_window
    monkeypatch.setattr(
        stepping, "augmented_window", lambda values, *rest: seen.append(values) or window(values, *rest)
    )
    train(settings, tmp_path / "told", law=law)
    recorded = {values.tobytes() for values in small_data.part("train")}
    assert len({values.tobytes() for values in seen}) == len(seen) == settings.max_steps * settings.batch_size
    assert not recorded & {values.tobytes() for values in seen}
    told = read_json(tmp_path / "told" / "config.json")
    assert told["law_sha256"] == law.sha256 and told["scale"] == fit_scale(small_data.part("train"))
    assert "told the law" in (tmp_path / "told" / "README.md").read_text()
    assert load_run(tmp_path / "told").settings == settings
    plain = settings_sha256(settings, small_data, told["base_sha256"])
    assert told["settings_sha256"] == settings_sha256(settings, small_data, told["base_sha256"], law.sha256) != plain


@pytest.mark.slow
def test_a_run_that_is_told_the_law_resumes_to_the_bit_and_under_that_law_only(train, law, tmp_path, stop_in_step_six):
    whole = train(QUICK, tmp_path / "whole", law=law)
    stop_in_step_six(tmp_path / "stopped", law=law)
    with pytest.raises(UserError, match=r"law [0-9a-f]{12} then, none now"):
        train(QUICK, tmp_path / "stopped", resume=True)
    resumed = train(QUICK, tmp_path / "stopped", resume=True, law=law)
    assert _same(_weights(whole.model), _weights(resumed.model))
    assert whole.history[STEADY].equals(resumed.history[STEADY])


def test_hashes_of_recorded_runs_are_what_they_were():
    folder = EMBEDDED_BASE.parent / "extended"
    config = read_json(folder / "config.json")
    assert settings_sha256(STAGES["extended"], load_dataset(), config["base_sha256"]) == config["settings_sha256"]


def test_a_stopped_run_is_resumed_with_its_own_settings_only(train, tmp_path, stop_after_a_save):
    stop_after_a_save(tmp_path)
    with pytest.raises(UserError, match=r"other settings \(learning_rate 0.01 then, 0.003 now\); give the same ones"):
        train(replace(QUICK, learning_rate=3e-3), tmp_path, resume=True)
    with pytest.raises(UserError, match="holds a run that was stopped; add --resume"):
        train(QUICK, tmp_path)
    (tmp_path / "state.safetensors").write_bytes(b"junk")
    with pytest.raises(UserError, match="not a readable training state"):
        train(QUICK, tmp_path, resume=True)


def test_a_folder_that_is_no_run_is_refused(tmp_path, tiny_folder):
    for folder in (tmp_path, tiny_folder):
        with pytest.raises(UserError, match=f"{folder}: not a run folder"):
            load_run(folder)


def test_a_run_whose_base_has_changed_is_refused(run, tmp_path, tiny_base):
    folder = tmp_path / "run"
    folder.mkdir()
    for path in run[0].iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    other = tiny_base(head_bias=False)
    with torch.no_grad():
        other.model.model.norm.weight.mul_(1.5)
    other.model.save_pretrained(tmp_path / "other")
    other.tokenizer.save_pretrained(tmp_path / "other")
    config = read_json(folder / "config.json") | {"base": str(tmp_path / "other")}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="this adapter was trained on base"):
        load_run(folder)


@pytest.mark.parametrize(
    "change",
    [
        dict(batch_size=0),
        dict(max_steps=0),
        dict(max_length=1),
        dict(eval_steps=0),
        dict(eval_windows=0),
        dict(save_steps=-1),
        dict(seed=-1),
        dict(warmup_ratio=1.0),
        dict(lora_dropout=1.5),
        dict(learning_rate=0.0),
        dict(learning_rate=float("nan")),
        dict(weight_decay=-1.0),
        dict(max_grad_norm=0.0),
    ],
)
def test_impossible_settings_are_refused(change):
    ((name, value),) = change.items()
    with pytest.raises(UserError, match=f"{name} {value}: "):
        replace(QUICK, **change)


def test_whole_numbers_and_floats_are_the_same_settings():
    whole = replace(QUICK, lora_alpha=32, weight_decay=0)
    assert json.dumps(asdict(whole)) == json.dumps(asdict(replace(QUICK, lora_alpha=32.0, weight_decay=0.0)))


def test_a_step_is_clipped_adamw_at_the_scheduled_rate(tiny_base, small_data, monkeypatch):
    """Against PyTorch's optimizer, given the same gradients."""
    settings = replace(QUICK, max_grad_norm=0.01, weight_decay=0.1)
    work = stepping.Training(tiny_base(), small_data, settings, Codec(1.0))
    theirs = {name: torch.nn.Parameter(p.detach().clone()) for name, p in work.parameters.items()}
    reference, step = torch.optim.AdamW(theirs.values(), lr=1.0, weight_decay=0.1), work.optimizer.step

    def noted(*args, **options):
        for name, p in work.parameters.items():
            theirs[name].grad = p.grad.clone()
        return step(*args, **options)

    monkeypatch.setattr(work.optimizer, "step", noted)
    for number in range(4):
        work.step()
        assert torch.stack([p.grad.norm() for p in theirs.values()]).norm() <= 0.0101
        reference.param_groups[0]["lr"] = settings.rate(number)
        reference.step()
        for name, p in work.parameters.items():
            torch.testing.assert_close(p, theirs[name])


@pytest.fixture
def windows_read(monkeypatch):
    """Every window that a loss was computed of."""
    read, loss = [], stepping._loss
    monkeypatch.setattr(stepping, "_loss", lambda base, batch, *rest: read.extend(batch) or loss(base, batch, *rest))
    return read


@pytest.mark.slow
def test_an_epoch_of_steps_reads_every_training_window_once(tiny_base, small_data, windows_read):
    codec = Codec(fit_scale(small_data.part("train")))
    work = stepping.Training(tiny_base(), small_data, QUICK, codec)
    windows = text_windows(small_data.part("train"), codec, work.base.tokenizer, QUICK.max_length)
    assert len(windows) % QUICK.batch_size == 0
    for _ in range(len(windows) // QUICK.batch_size):
        work.step()
    assert sorted(map(tuple, windows_read)) == sorted(map(tuple, windows))
    other = stepping.Training(tiny_base(), small_data, replace(QUICK, seed=1), codec)
    first, second = ([tuple(w.window(place)) for place in range(len(windows))] for w in (work, other))
    assert first != second and sorted(first) == sorted(second)  # the seed orders them


@pytest.mark.parametrize("precision", [1, 3])
def test_a_run_is_trained_and_loaded_at_its_precision(tiny_base, small_data, tmp_path, windows_read, precision):
    base = tiny_base()
    train_lora(base, small_data, replace(QUICK, max_steps=1, precision=precision), tmp_path / "run", progress=False)
    codec = Codec(fit_scale(small_data.part("train")), precision)
    assert load_run(tmp_path / "run").codec == codec
    texts = [codec.encode(values) for part in ("train", "validation") for values in small_data.part(part)]
    assert all(any(base.tokenizer.decode(ids) in text for text in texts) for ids in windows_read)


def test_the_learning_rate_warms_up_and_falls_along_a_cosine():
    settings = TrainSettings(max_steps=100, warmup_ratio=0.1, learning_rate=1e-3)
    rates = [settings.rate(step) for step in range(100)]
    np.testing.assert_allclose(rates[:10], 1e-3 * np.arange(1, 11) / 10)
    np.testing.assert_allclose(rates[10:], 1e-3 * (1 + np.cos(np.pi * np.arange(90) / 90)) / 2)


def test_the_stages_are_those_of_the_design():
    initial, final = STAGES["initial"], STAGES["final"]
    assert (initial.lora_r, initial.max_length, initial.max_steps) == (4, 512, 1000)
    assert (final.lora_r, final.max_length) == (8, 768)


# ---------------------------------------------------------------- other bases


SIZES = dict(vocab_size=259, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)


@pytest.mark.slow
@pytest.mark.parametrize(
    "config, settings",
    [
        (LlamaConfig(**SIZES), QUICK),
        (Qwen3Config(**SIZES, num_key_value_heads=1, head_dim=16), QUICK),
        (GPT2Config(vocab_size=259, n_embd=32, n_layer=1, n_head=2, n_positions=256), replace(QUICK, lora_r=0)),
    ],
)
def test_another_architecture_trains_and_forecasts(config, settings, small_data, tmp_path):
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "other")
    embedded_tokenizer().save_pretrained(tmp_path / "other")
    base = load_base(str(tmp_path / "other"))
    result = train_lora(base, small_data, replace(settings, max_steps=2), tmp_path / "run", progress=False)
    assert np.isfinite(result.history["val_loss"]).all() and result.history["flops"].iloc[-1] > 0
    run = load_run(tmp_path / "run")
    torch.testing.assert_close(_logits(run.base.model), _logits(result.model), atol=1e-5, rtol=1e-5)
    assert len(forecast(run.base, run.codec, [np.ones((3, 2)), np.ones((5, 2))], 1)) == 2


# ---------------------------------------------------------------- batches


def test_padding_changes_no_loss(tiny_base):
    """The loss of a padded batch is the mean over tokens of the windows' own losses."""
    base = tiny_base()
    with torch.no_grad():
        base.model.lm_head.bias.normal_(generator=torch.Generator().manual_seed(0))
    rng = np.random.default_rng(0)
    batch = [rng.integers(10, 27, n) for n in (20, 33, 7, 2)]
    with torch.no_grad():
        together, shape = stepping._loss(base, batch)
        apart = [stepping._loss(base, [window])[0].item() for window in batch]
    assert shape == (4, 33)
    assert together.item() == pytest.approx(np.average(apart, weights=[len(w) - 1 for w in batch]), rel=1e-5)


def test_the_validation_loss_is_the_mean_over_tokens(tiny_base):
    """Whatever the batches: seven windows of different lengths in batches of three."""
    base = tiny_base()
    rng = np.random.default_rng(0)
    validation = [rng.integers(10, 27, n) for n in (5, 40, 17, 2, 30, 9, 21)]
    with torch.no_grad():
        apart = [stepping._loss(base, [window])[0].item() for window in validation]
    base.model.train()
    val_loss, spent = stepping._validate(base, QUICK, validation, lambda shape: Cost(*shape))
    assert val_loss == pytest.approx(np.average(apart, weights=[len(w) - 1 for w in validation]), rel=1e-5)
    assert spent == Cost(7, 9 + 30 + 40)  # rows, and the longest of each batch, shortest windows first


def test_padding_changes_no_gradient(tiny_base):
    base = tiny_base()
    batch = [np.arange(10, 27), np.arange(12, 20)]
    gradients = []
    for windows in (batch, batch[:1], batch[1:]):
        base.model.zero_grad()
        stepping._loss(base, windows)[0].backward()
        gradients.append(base.model.model.embed_tokens.weight.grad.clone())
    together, long, short = gradients
    torch.testing.assert_close(together, (16 * long + 7 * short) / 23, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("change", [dict(rescale=0.5), dict(random_start=1), dict(rescale=0.5, random_start=1)])
def test_augmented_windows_are_cut_from_rescaled_series(tiny_base, small_data, change):
    """Each is a stretch of the text of one training series times one factor; the same place, the same window."""
    series, settings = small_data.part("train"), replace(QUICK, **change)
    codec = Codec(fit_scale(series))
    work = stepping.Training(tiny_base(), small_data, settings, codec)
    texts = [work.base.tokenizer.decode(work.window(place)) for place in range(40)]
    assert texts == [work.base.tokenizer.decode(work.window(place)) for place in range(40)]
    assert all(len(text) <= QUICK.max_length for text in texts) and len(set(texts)) > 20
    sources = [series[pick(settings.seed, place, len(series))] for place in range(40)]
    plain = [codec.encode(values) for values in sources]
    if settings.random_start:
        assert min(map(len, texts)) >= QUICK.max_length // 4
    if settings.rescale:
        factors = np.array([f for pair in zip(texts, sources, strict=True) for f in _factor(*pair, codec)])
        assert len(factors) > 20 and sum(text in whole for text, whole in zip(texts, plain, strict=True)) < 5
        assert np.exp(-0.52) < factors.min() < 0.8 < 1.25 < factors.max() < np.exp(0.52)  # 0.5, and the rounding
    else:
        starts = np.array([whole.index(text) for text, whole in zip(texts, plain, strict=True)])
        assert 0.3 < np.mean(starts == 0) < 0.7 and (starts % QUICK.max_length > 0).any()


def _factor(text, values, codec):
    """The one factor that makes a stretch of the series what a window says, in a list; none where it holds too little to tell.

    A number written as v, half a last digit up or down, is f · x for every f from (v − half) / x to (v + half) / x.
    """
    text = text.partition(codec.step_separator)[2]  # the first step may have been cut
    written, stop = codec.decode(text, values.shape[1])  # (steps, variables)
    assert codec.step_separator not in text[stop:]
    if len(written) < 2:
        return []
    half = 0.5001 * 10.0**-codec.precision / codec.scale
    stretches = np.stack([values[i : i + len(written)] for i in range(len(values) - len(written) + 1)])
    low, high = ((written - half) / stretches).max((1, 2)), ((written + half) / stretches).min((1, 2))  # (stretches,)
    assert (low <= high).any(), text
    return [((low + high) / 2)[np.argmax(high - low)]]


@pytest.mark.parametrize("checkpointing", [0, 1])
def test_activation_checkpointing_runs_a_layer_forward_once_more(tiny_base, small_data, checkpointing):
    settings, passes = replace(QUICK, gradient_checkpointing=checkpointing), []
    work = stepping.Training(tiny_base(), small_data, settings, Codec(1.0))
    attention = work.base.model.model.layers[1].self_attn  # a hook of the layer itself would not see the second pass
    attention.register_forward_pre_hook(lambda *_: passes.append("forward"))
    work.step()
    assert len(passes) == 1 + checkpointing


@pytest.mark.slow
def test_activation_checkpointing_trains_the_same_and_is_charged(train, run):
    """What is learned is the same, at the price of the second forward pass."""
    result = train(replace(QUICK, gradient_checkpointing=1))
    assert _same(_weights(result.model), _weights(run[1].model))
    assert any(p.abs().max() > 0 for name, p in _weights(result.model).items() if "lora_B" in name)
    assert result.history["flops"].iloc[-1] > 1.1 * run[1].history["flops"].iloc[-1]


def test_the_numeric_head_scores_the_right_characters(tiny_base, small_data):
    """Against the softmax over the numeric characters, written out."""
    base = tiny_base()
    work = stepping.Training(base, small_data, replace(QUICK, numeric_head=1), Codec(1.0))
    ids = torch.from_numpy(work.window(0))
    ours, _ = stepping._loss(base, [ids.numpy()], work.characters)
    tokens = torch.from_numpy(numeric_tokens(work.codec, base.tokenizer))
    log_p = base.model(ids[None]).logits[0, :-1, tokens].log_softmax(-1)  # (length - 1, 14)
    expected = -log_p[ids[1:, None] == tokens].mean()
    torch.testing.assert_close(ours, expected)


@pytest.mark.slow
def test_the_numeric_head_scores_fourteen_characters(train, tiny_base, small_data):
    """It costs less, and learns the same text: a bias moves for those characters only."""
    full, numeric = train(), train(replace(QUICK, numeric_head=1))
    assert numeric.history["flops"].iloc[-1] < full.history["flops"].iloc[-1]
    assert numeric.history["loss"].iloc[0] < full.history["loss"].iloc[0]  # nothing is lost on other characters
    moved = numeric.model.lm_head.bias.nonzero().flatten().tolist()
    assert moved and set(moved) <= set(tiny_base().tokenizer("0123456789.-,;")["input_ids"])
    config, settings = tiny_base().model.config, replace(QUICK, numeric_head=1)
    step = stepping.Training(tiny_base(), small_data, settings, Codec(1.0)).most(1)["train"]
    assert step.flops == forward_account(config, 3, 48, loss=True, lora_r=2, vocabulary=14).training


class _Largest(TorchDispatchMode):
    """Notes how many numbers the largest tensor holds that any operation returns, in the backward pass too."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves(found) if isinstance(leaf, torch.Tensor)]
        self.numbers = max([self.numbers, *(tensor.numel() for tensor in tensors)])
        return found


@pytest.mark.slow
def test_no_tensor_holds_every_position_times_the_whole_vocabulary(long_data):
    """The logits of one chunk are the largest there is, in a training step and in a validation."""
    vocabulary = 4096
    model = add_head_bias(Qwen2ForCausalLM(embedded_config(**SIZES | dict(vocab_size=vocabulary))))
    settings = replace(QUICK, batch_size=4, max_length=256, eval_windows=4)
    base = Base(model, embedded_tokenizer(), "wide", "")
    work = stepping.Training(base, long_data, settings, Codec(1.0))
    one_batch = [work.window(place) for place in range(4)]
    for do, windows in ((work.step, one_batch), (lambda: work.validate(lambda: False), work.validation)):
        assert len(windows) == 4 and sum(len(ids) - 1 for ids in windows) > 2 * CHUNK  # positions that are scored
        with _Largest() as largest:
            do()
        assert largest.numbers == CHUNK * vocabulary


# ---------------------------------------------------------------- FLOPs


@pytest.mark.parametrize("change", [{}, dict(target_modules=("q_proj", "down_proj")), dict(lora_r=0)])
def test_flops_are_three_forward_passes_and_the_validations(train, tiny_base, monkeypatch, change):
    settings = replace(QUICK, max_steps=4, **change)
    passes = []

    def watch(base, *rest):
        result = loss(base, *rest)
        passes.append((base.model.training, result[1]))
        return result

    loss = stepping._loss
    monkeypatch.setattr(stepping, "_loss", watch)
    history = train(settings).history
    config, adapted = tiny_base().model.config, dict(lora_r=settings.lora_r, target_modules=settings.target_modules)
    by_hand = [
        (3 if is_training else 1) * forward_account(config, *shape, loss=True, **adapted).forward
        for is_training, shape in passes
    ]
    flags = [is_training for is_training, _ in passes]
    ends = [i for i, now in enumerate(flags) if not now and (i + 1 == len(flags) or flags[i + 1])]  # of validations
    assert sum(flags) == 4 and len(ends) == 2
    assert history["flops"].tolist() == np.cumsum(by_hand)[ends].tolist()


def test_series_loss_is_the_loss_per_token_that_transformers_computes(tiny_base, small_data):
    base, codec = tiny_base(), Codec(fit_scale(small_data.part("train")))
    series = small_data.part("test")[:2, :10]  # (2, 10, 2): each text fits into one window
    total = count = 0
    for values in series:
        ids = torch.tensor([base.tokenizer(codec.encode(values))["input_ids"]])
        with torch.no_grad():
            loss = base.model(input_ids=ids, labels=ids).loss
        total, count = total + loss.item() * (ids.shape[1] - 1), count + ids.shape[1] - 1
    assert stepping.series_loss(base, codec, series) == pytest.approx(total / count, rel=1e-5)
