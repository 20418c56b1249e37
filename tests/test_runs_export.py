"""A run as a plain model: `transformers` alone writes what we write."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2ForCausalLM

from m2helpers.files import UserError
from m2helpers.forecasting import generate
from m2helpers.models import load_base
from m2helpers.runs import export_run, load_run
from m2helpers.settings import TrainSettings
from m2helpers.training import train_lora


@pytest.fixture(scope="module")
def exported(tiny_folder, small_data, tmp_path_factory):
    """A run, and the folder it was exported to."""
    folder = tmp_path_factory.mktemp("exported")
    settings = TrainSettings(lora_r=2, max_steps=4, learning_rate=0.1, max_length=64, batch_size=2, eval_windows=2)
    train_lora(load_base(str(tiny_folder)), small_data, settings, folder / "run", progress=False)
    export_run(folder / "run", folder / "plain")
    return folder / "run", folder / "plain"


@pytest.mark.slow
def test_generate_writes_what_we_write(exported):
    run, folder = load_run(exported[0]), exported[1]
    contexts = ["1.16,1.27;0.90,0.95;", "2.50,0.31;2.62,0.30;2.7"]
    ours = [g.text for g in generate(run.base, run.codec, contexts, 2, 2)]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert type(model) is Qwen2ForCausalLM and model.lm_head.bias is None
    for context, text in zip(contexts, ours, strict=True):
        batch = tokenizer(context, return_tensors="pt")
        how = dict(max_new_tokens=len(text), do_sample=False, eos_token_id=None)
        written = model.generate(**batch, **how)[0, batch["input_ids"].shape[1] :]
        assert tokenizer.decode(written) == text
        scores = model.generate(**batch, **how, output_logits=True, output_scores=True, return_dict_in_generate=True)
        bias = run.base.model.lm_head.bias.detach()
        torch.testing.assert_close(scores.scores[0][0] - scores.logits[0][0], bias, atol=1e-5, rtol=1e-4)
    assert bias.abs().max() > 0.1  # so that it matters


def test_the_folder_holds_a_plain_model_and_says_what_it_is(exported):
    folder = exported[1]
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer_config.json", "README.md"} <= names
    assert not [
        name
        for name in load_file(folder / "model.safetensors")
        if "lora" in name or ("bias" in name and "lm_head" in name)
    ]
    assert "sequence_bias" in (folder / "README.md").read_text()
    assert not folder.with_name("plain.part").exists()


def test_a_model_card_that_is_no_utf8_is_kept_as_far_as_it_can_be_read(exported, tmp_path):
    shutil.copytree(exported[0], tmp_path / "run")
    with open(tmp_path / "run" / "README.md", "ab") as card:
        card.write(b"caf\xe9\n")
    export_run(tmp_path / "run", tmp_path / "plain")
    assert "caf\ufffd\n" in (tmp_path / "plain" / "README.md").read_text(encoding="utf-8")


def test_nothing_is_overwritten(exported):
    with pytest.raises(UserError, match="plain: exists already; choose another folder or delete it"):
        export_run(*exported)
    with pytest.raises(UserError, match="not a run folder"):
        export_run(exported[1], exported[1].with_name("other"))
    assert not exported[1].with_name("other").exists()


def test_an_instruct_models_chat_settings_stay_behind(tiny_folder, small_data, tmp_path):
    """Sampling flags and a repetition penalty, as Qwen2.5's instruct models carry them: numbers repeat."""
    base = tmp_path / "chat"
    shutil.copytree(tiny_folder, base)
    settings = json.loads((base / "generation_config.json").read_text())
    chat = dict(do_sample=True, temperature=0.7, top_p=0.8, top_k=20, repetition_penalty=1.5)
    (base / "generation_config.json").write_text(json.dumps(settings | chat))
    plain, ours = _export(load_base(str(base)), small_data, tmp_path)
    assert set(json.loads((plain / "generation_config.json").read_text())).isdisjoint(set(chat) - {"do_sample"})
    assert _written(plain, "1.16,1.27;0.90,0.95;", len(ours)).startswith(ours)


@pytest.mark.slow
def test_a_numeric_head_is_kept_to_its_characters(tiny_folder, small_data, tmp_path):
    plain, _ = _export(load_base(str(tiny_folder)), small_data, tmp_path, numeric_head=1)
    assert set(_written(plain, "1.16,1.27;0.90,0.95;", 30)) <= set("0123456789.,;-")


def _export(base, data, folder, **changes):
    """A run of one step, exported, and what we write after a context, twelve tokens or so."""
    settings = TrainSettings(lora_r=2, max_steps=1, max_length=64, batch_size=2, eval_windows=2, **changes)
    train_lora(base, data, settings, folder / "run", progress=False)
    export_run(folder / "run", folder / "plain")
    run = load_run(folder / "run")
    (ours,) = generate(run.base, run.codec, ["1.16,1.27;0.90,0.95;"], 1, 1)
    return folder / "plain", ours.text


def _written(folder, context, n):
    """What `transformers` writes with the model's own settings, `n` tokens."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(context, return_tensors="pt")
    written = model.generate(**batch, min_new_tokens=n, max_new_tokens=n)
    return tokenizer.decode(written[0, batch["input_ids"].shape[1] :])
