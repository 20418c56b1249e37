"""Pre-training: one seed one model, stops and resumes, and the folder it leaves."""

import json
import multiprocessing
import os
import signal
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, Qwen2ForCausalLM, Qwen2Tokenizer

from m2helpers.engine.loop import Stopped
from m2helpers.engine.losses import Diverged
from m2helpers.engine.resume import has_state
from m2helpers.files import UserError, read_json, sha256_file
from m2helpers.flops.account import forward_account
from m2helpers.models import embedded_config, embedded_tokenizer, load_base
from m2helpers.pretraining import batches, synthetic
from m2helpers.pretraining import run as pretraining
from m2helpers.pretraining.card import model_card
from m2helpers.pretraining.families import FAMILIES
from m2helpers.pretraining.run import mixture_loss, pretrain
from m2helpers.settings import PretrainSettings
from m2helpers.text import right_pad, tokenise

TINY = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)
QUICK = PretrainSettings(
    tokens=7 * 2 * 32 + 5,
    batch_size=2,
    eval_texts=2,
    max_length=32,
    warmup_steps=2,
    log_steps=2,
    eval_steps=3,
    save_steps=2,
    learning_rate=1e-2,
    adamw_learning_rate=1e-2,
)
FILES = ["README.md", "config.json", "generation_config.json", "model.safetensors"]
FILES += ["pretraining.json", "tokenizer.json", "tokenizer_config.json"]


@pytest.fixture(scope="module", autouse=True)
def few_texts_at_once():
    """Blocks of eight texts, four steps, so that a run of seven crosses from one to the next; two families in the mixture."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches, "BLOCK", 8)
        few = {name: FAMILIES[name] for name in ("glycolysis", "schnakenberg")}
        for module in (pretraining, batches, synthetic):
            patch.setattr(module, "FAMILIES", few)
        batches.held_out.cache_clear()
        yield
        batches.held_out.cache_clear()


def _run(folder, settings=QUICK, **options):
    return pretrain(settings, folder, **dict(architecture=TINY) | options)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run from start to end: its folder and its record."""
    folder = tmp_path_factory.mktemp("pretrained") / "whole"
    return folder, _run(folder)


def _agree(first, second):
    """Two finished runs have the same bits and the same records, but for the clock."""
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()
    records = []
    for folder in (first, second):
        record = read_json(folder / "pretraining.json")
        del record["seconds"], record["total"]["seconds"]
        record["history"] = [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in record["history"]]
        records.append(record)
    assert records[0] == records[1]


@pytest.mark.slow
def test_one_seed_gives_one_model(whole, tmp_path):
    _run(tmp_path / "again")
    _agree(whole[0], tmp_path / "again")
    _run(tmp_path / "other", replace(QUICK, seed=1))
    assert sha256_file(tmp_path / "other" / "model.safetensors") != sha256_file(whole[0] / "model.safetensors")


@pytest.mark.slow
def test_a_run_out_of_time_goes_on_as_if_it_had_not_been(whole, tmp_path):
    """No time at all: it stops after each step, so five are one stop each, two of them right before a validation."""
    folder = tmp_path / "run"
    for step in range(1, 6):
        record = _run(folder, stop_after=0.0, resume=step > 1)
        assert record["step"] == step and "state.safetensors" in {p.name for p in folder.iterdir()}
    _run(folder, resume=True)
    assert sorted(p.name for p in folder.iterdir()) == FILES
    _agree(whole[0], folder)


def test_a_run_that_was_killed_goes_on_from_its_last_save(whole, tmp_path, monkeypatch):
    """Killed in step 4, past the validation of step 3 and the save of step 2."""
    losses = []

    def die(*args):
        losses.append(args)
        if len(losses) == 6:  # three steps, two families validated, and the fourth step
            raise KeyboardInterrupt
        return loss(*args)

    loss = pretraining._loss
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pretraining, "_loss", die)
        _run(tmp_path / "run")
    _run(tmp_path / "run", resume=True)
    _agree(whole[0], tmp_path / "run")


def test_the_folder_is_a_base(whole):
    folder, record = whole
    assert sorted(p.name for p in folder.iterdir()) == FILES
    base = load_base(str(folder))
    for name, tensor in load_file(folder / "model.safetensors").items():
        assert torch.equal(base.model.get_parameter(name), tensor)
    assert sum(p.numel() for p in base.model.parameters()) == record["parameters"] + 259
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert isinstance(tokenizer, Qwen2Tokenizer) and tokenizer("1.23")["input_ids"] == [16, 13, 17, 18]
    assert base.model.config.architectures == ["Qwen2ForCausalLM"]


def test_the_record_says_what_was_done(whole):
    folder, record = whole
    assert read_json(folder / "pretraining.json") == json.loads(json.dumps(record))
    assert record["step"] == 7 and record["tokens"] == 7 * 2 * 32
    assert [row["step"] for row in record["history"]] == [2, 3, 4, 6, 7]
    assert [row["step"] for row in record["history"] if row["val_loss"] is not None] == [3, 6, 7]
    assert set(record["loss_by_family"]) == {"glycolysis", "schnakenberg"}
    assert record["history"][-1]["val_loss"] == pytest.approx(np.mean(list(record["loss_by_family"].values())))
    config = load_base(str(folder)).model.config
    assert record["flops"] == 7 * 3 * forward_account(config, 2, 32, head_bias=False).forward


def test_the_model_card_agrees_with_the_record(whole):
    folder, record = whole
    card = (folder / "README.md").read_text()
    assert card == model_card(read_json(folder / "pretraining.json"))
    assert f"| tokens | {record['tokens']:,} in 1 sitting |" in card
    assert f"{record['parameters']:,} parameters" in card and "**not** Qwen2.5" in card
    assert f"| {record['flops']:.3g} |" in card
    assert f"| validation loss | {record['history'][-1]['val_loss']:.4f} nats a token |" in card
    for name, loss in record["loss_by_family"].items():
        assert f"| {name} | {loss:.3f} |" in card


def test_pre_training_leaves_the_processor_as_it_was(whole):
    """Numbers below the smallest normal one exist again afterwards."""
    assert np.float32(1e-39) * np.float32(1) > 0 and (torch.tensor([1e-39]) * 1).item() > 0


@pytest.mark.slow
def test_the_loss_falls(tmp_path):
    settings = replace(QUICK, tokens=20 * 64, learning_rate=3e-2, adamw_learning_rate=3e-2, eval_steps=5)
    history = _run(tmp_path / "run", settings)["history"]
    assert history[-1]["val_loss"] < 0.8 * history[0]["loss"]


def test_padding_changes_no_loss():
    """The loss of texts of different lengths is the mean over their tokens, as if each had been alone."""
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(embedded_config(**TINY, initializer_range=0.3)).eval()
    ids = tokenise(["1.16,1.27;0.90,0.95;", "0.5;", "12;7;"], embedded_tokenizer())
    with torch.no_grad():
        together, *apart = (
            pretraining._loss(model, torch.from_numpy(right_pad(rows, 256)[0])).item()
            for rows in (ids, *([row] for row in ids))
        )
    assert together == pytest.approx(np.average(apart, weights=[len(row) - 1 for row in ids]), rel=1e-5)


def test_a_step_in_parts_has_the_gradients_of_the_whole(monkeypatch):
    """Texts of different lengths, two at a time: every token counts as much as in one go."""
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(embedded_config(**TINY, initializer_range=0.3))
    ids, _ = right_pad(
        tokenise(["1.16,1.27;0.90,0.95;", "0.5;", "12;7;", "3.14;2.72;", "8;"], embedded_tokenizer()), 256
    )
    # In bfloat16, rounding would hide small differences.
    monkeypatch.setattr(pretraining, "mixed_precision", lambda model: nullcontext())
    found = []
    for texts in (5, 2):
        monkeypatch.setattr(pretraining, "CPU_TEXTS", texts)
        loss = pretraining._backward(model, torch.from_numpy(ids))
        found.append([loss, *(p.grad for p in model.parameters())])
        model.zero_grad(set_to_none=True)
    for whole, parts in zip(*found, strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-6)


def test_no_text_is_seen_twice():
    """Eight steps are two blocks of texts: the second is another one."""
    texts = list(batches.step_texts(replace(QUICK, tokens=8 * 2 * 32), 0, "cpu"))
    assert [batch.shape for batch in texts] == [(2, 32)] * 8
    assert len({row.numpy().tobytes() for batch in texts for row in batch}) == 16


def test_every_batch_size_and_every_start_gives_the_same_texts():
    """Steps of four texts read what steps of two read, and a run that goes on in the middle of a block misses none."""
    settings = replace(QUICK, tokens=8 * 2 * 32)
    whole = torch.cat(list(batches.step_texts(settings, 0, "cpu")))
    assert torch.equal(torch.cat(list(batches.step_texts(replace(settings, batch_size=4), 0, "cpu"))), whole)
    for first in range(1, 8):
        assert torch.equal(torch.cat(list(batches.step_texts(settings, first, "cpu"))), whole[2 * first :])


@pytest.mark.slow
def test_texts_drawn_by_workers_are_the_same(monkeypatch):
    """Beside a GPU other processes draw them: in order, none twice, and no matter that the whole group is told to end."""
    settings = replace(QUICK, tokens=20 * 2 * 32)
    monkeypatch.setattr("os.cpu_count", lambda: 3)
    texts = batches.step_texts(settings, 0, "cuda")
    drawn = [next(texts)]
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    for worker, number in zip(workers, (signal.SIGTERM, signal.SIGINT), strict=True):
        os.kill(worker.pid, number)
    assert torch.equal(torch.cat(drawn + list(texts)), torch.cat(list(batches.step_texts(settings, 0, "cpu"))))
    assert not multiprocessing.active_children()


def test_the_rate_warms_up_stays_and_falls():
    settings = PretrainSettings(tokens=200, batch_size=1, max_length=2, warmup_steps=10, decay_fraction=0.25)
    rates = [settings.schedule(step) for step in range(settings.max_steps)]
    np.testing.assert_allclose(rates[:10], np.arange(1, 11) / 10)
    np.testing.assert_allclose(rates[10:76], 1.0)
    np.testing.assert_allclose(rates[75:], np.arange(25, 0, -1) / 25)


def test_the_loss_on_the_mixture_is_that_of_validation(whole):
    folder, record = whole
    base = load_base(str(folder))
    losses = mixture_loss(base, n_per_family=QUICK.batch_size, length=QUICK.max_length)
    assert losses == pytest.approx(record["loss_by_family"], rel=1e-6)
    with torch.no_grad():
        base.model.lm_head.bias[15] += 20.0
    assert all(loss > losses[name] for name, loss in mixture_loss(base, QUICK.batch_size, QUICK.max_length).items())


# ---------------------------------------------------------------- a further sitting


@pytest.mark.slow
def test_a_further_sitting_goes_on_from_the_weights(whole, tmp_path):
    """It starts where the first ended, keeps account of what that had cost, and resumes like any run."""
    folder, first = whole
    more = replace(QUICK, seed=1, learning_rate=1e-9, adamw_learning_rate=1e-9)  # so slow that it stays there
    second = _run(tmp_path / "second", more, start=str(folder))
    losses, losses_before = ([row["val_loss"] for row in r["history"] if row["val_loss"]] for r in (second, first))
    assert losses == pytest.approx([losses_before[-1]] * len(losses), rel=1e-4)
    assert abs(losses_before[0] - losses_before[-1]) > 0.1
    (before,) = second["before"]
    assert {key: before[key] for key in ("tokens", "flops", "seconds")} == {
        key: first[key] for key in ("tokens", "flops", "seconds")
    }
    assert (before["seed"], before["sha256"]) == (0, sha256_file(folder / "model.safetensors"))
    card = (tmp_path / "second" / "README.md").read_text()
    assert f"| tokens | {2 * first['tokens']:,} in 2 sittings |" in card

    _run(tmp_path / "stopped", more, start=str(folder), stop_after=0.0)
    with pytest.raises(UserError, match="started from other weights; give the same --model to resume"):
        _run(tmp_path / "stopped", more, resume=True)
    _run(tmp_path / "stopped", more, start=str(folder), resume=True)
    _agree(tmp_path / "second", tmp_path / "stopped")
    third = _run(tmp_path / "third", replace(more, seed=2), start=str(tmp_path / "second"))
    assert [sitting["seed"] for sitting in third["before"]] == [0, 1]


def test_what_cannot_be_gone_on_from(whole, tmp_path, tiny_folder):
    with pytest.raises(UserError, match="has seen the texts of seed 0; give another --seed"):
        _run(tmp_path / "run", QUICK, start=str(whole[0]))
    with pytest.raises(
        UserError, match=r"no pretraining.json in .*; only a base pre-trained here can be trained further"
    ):
        _run(tmp_path / "run", replace(QUICK, seed=1), start=str(tiny_folder))


def test_a_signal_saves_and_stops_within_one_step(whole, tmp_path, monkeypatch):
    loss, seen = pretraining._loss, []

    def ask(*args):
        seen.append(args)
        if len(seen) == 6:  # three steps, two families validated, and the fourth step
            os.kill(os.getpid(), signal.SIGTERM)
        return loss(*args)

    with (
        monkeypatch.context() as patch,
        pytest.raises(Stopped, match="run: stopped at step 4 of 7; --resume goes on from there"),
    ):
        patch.setattr(pretraining, "_loss", ask)
        _run(tmp_path / "run")
    _run(tmp_path / "run", resume=True)
    _agree(whole[0], tmp_path / "run")


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("name", "value"),
    [("batch_size", 0), ("max_length", 1), ("tokens", -1), ("learning_rate", -1e-3), ("weight_decay", float("nan"))],
)
def test_settings_that_mean_nothing_are_refused(name, value):
    with pytest.raises(UserError, match=f"{name} .*: must be at least [012]"):
        PretrainSettings(**{name: value})


def test_clipping_to_nothing_is_refused():
    with pytest.raises(UserError, match=r"max_grad_norm 0\.0: give a number above 0"):
        PretrainSettings(max_grad_norm=0)


def test_a_loss_that_is_no_number_ends_the_run(tmp_path, monkeypatch):
    """By the next row of the history: the save before it stays."""
    backward, taken = pretraining._backward, []

    def diverge(*args):
        taken.append(backward(*args))
        return taken[-1] * (float("nan") if len(taken) == 4 else 1)

    monkeypatch.setattr(pretraining, "_backward", diverge)
    with pytest.raises(Diverged, match="step 4: the loss is no longer a number; use a smaller learning_rate"):
        _run(tmp_path)
    assert has_state(tmp_path)


def test_other_settings_do_not_resume(tmp_path):
    _run(tmp_path, stop_after=0.0)
    before = (tmp_path / "state.safetensors").read_bytes()
    changed = r"learning_rate 0.01 then, 0.02 now; seed 0 then, 1 now"
    with pytest.raises(UserError, match=rf"started with other settings \({changed}\); give the same ones to resume"):
        _run(tmp_path, replace(QUICK, learning_rate=2e-2, seed=1), resume=True)
    with pytest.raises(UserError, match="holds a run that was stopped; add --resume or delete it"):
        _run(tmp_path)
    assert (tmp_path / "state.safetensors").read_bytes() == before


def test_nothing_to_resume_and_nothing_overwritten(whole, tmp_path):
    with pytest.raises(UserError, match="nothing to resume, leave --resume out"):
        _run(tmp_path / "none", resume=True)
    before = sha256_file(whole[0] / "model.safetensors")
    with pytest.raises(UserError, match="holds a model; choose another folder or delete it"):
        _run(whole[0], replace(QUICK, seed=2))
    assert sha256_file(whole[0] / "model.safetensors") == before
