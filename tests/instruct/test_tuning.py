"""Instruction tuning on a small base: the bill, stops and resumes, what is left in the folder, and that plain peft opens it."""

import json
import os
import signal
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen2Config, Qwen2ForCausalLM

from m2helpers.__main__ import main
from m2helpers.engine.loop import Stopped
from m2helpers.files import UserError, read_json
from m2helpers.flops import QWEN_15B, forward_account, generation_flops, lora_backward_flops
from m2helpers.instruct import folders, quietly, tuning
from m2helpers.instruct.quantised import add_adapter, load_for_tuning
from m2helpers.instruct.rows import Row
from m2helpers.instruct.tuning import tune
from m2helpers.ledger import CapReached, Ledger
from m2helpers.models import embedded_tokenizer
from m2helpers.settings import InstructSettings

pytestmark = pytest.mark.slow
CHECKOUT = Path(__file__).resolve().parents[2]
QUICK = InstructSettings(lora_r=2, learning_rate=1e-2, batch_size=1, max_length=96)
FOUR_BIT = 2 * (2 * 192 * 192 + 2 * 192 * 32 + 3 * 192 * 128)  # weights of the base below that are kept in four bits
ROWS = {
    "train": [Row("Next?", "1;" * n, str(n)) for n in range(1, 8)],
    "validation": [Row("Next?", "2;" * n, str(n)) for n in range(1, 4)],
}


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    """A folder in hub format: the architecture of Qwen2.5-1.5B with two layers, narrow ones, and random weights in bfloat16."""
    folder = tmp_path_factory.mktemp("models") / "narrow"
    narrow = dict(num_hidden_layers=2, hidden_size=192, intermediate_size=128, vocab_size=259, eos_token_id=258)
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**QWEN_15B | narrow, initializer_range=0.3))
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer = embedded_tokenizer()
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.save_pretrained(folder)
    return folder


def _write_rows(folder):
    for part, name in (("train", "train.jsonl"), ("validation", "val.jsonl")):
        (folder / name).write_text("".join(json.dumps(row._asdict()) + "\n" for row in ROWS[part]))
    return [f"--train={folder / 'train.jsonl'}", f"--val={folder / 'val.jsonl'}"]


def _tune(folder, base_folder, ledger, settings=QUICK, **options):
    base = load_for_tuning(str(base_folder), settings)
    return tune(base, ROWS, settings, folder, progress=False, ledger=ledger, **options)


def _weights(folder):
    return load_file(folder / "adapters" / "adapter_model.safetensors")


def _same(first, second):
    return first.keys() == second.keys() and all(torch.equal(p, second[name]) for name, p in first.items())


@pytest.fixture(scope="module")
def whole(base_folder, tmp_path_factory):
    """A run that was never stopped: its folder, what it gave back, and its ledger."""
    folder = tmp_path_factory.mktemp("whole")
    ledger = Ledger(folder / "ledger.sqlite")
    return folder / "run", _tune(folder / "run", base_folder, ledger), ledger


def test_what_a_run_leaves(whole):
    folder, _, _ = whole
    assert {path.name for path in folder.iterdir()} == {
        "adapters", "adaptermodel.zip", "history.csv", "instruct.json", "metrics.json",
    }  # fmt: skip
    weights = _weights(folder)
    assert set(weights) == {
        f"base_model.model.model.layers.{layer}.self_attn.{name}.lora_{side}.weight"
        for layer in range(2) for name in ("q_proj", "v_proj") for side in "AB"
    }  # fmt: skip
    metrics = read_json(folder / "metrics.json")
    assert metrics["trainable"] == sum(p.numel() for p in weights.values()) and metrics["after"]["rows"] == 3
    assert metrics["parameters"] == sum(p.numel() for p in weights.values()) + 370_688  # those in four bits too
    tokenizer = read_json(folder / "adapters" / "tokenizer_config.json")
    assert tokenizer["eos_token"] != tokenizer["pad_token"]
    history = pd.read_csv(folder / "history.csv")
    assert history["val_loss"].count() == 3 and history["step"].iloc[-1] == 12
    card = (folder / "adapters" / "README.md").read_text()
    assert f"{history['flops'].iloc[-1]:.4g}" in card and "FLOPs" in card
    with zipfile.ZipFile(folder / "adaptermodel.zip") as archive:
        assert {name: archive.read(name) for name in archive.namelist()} == {
            f"adapters/{path.name}": path.read_bytes() for path in (folder / "adapters").iterdir()
        }
    assert str(folder.parent) not in (folder / "adapters" / "adapter_config.json").read_text()


def test_every_batch_is_on_the_ledger(whole):
    """One row a batch, so that what is due can be added up by hand."""
    _, tuned, ledger = whole
    entries = ledger.entries()
    assert {entry["state"] for entry in entries} == {"settled"} and {entry["run"] for entry in entries} == {"run"}
    spent = {kind: [e["flops"] for e in entries if e["kind"] == kind] for kind in ("train", "validate", "generate")}

    def losses(part):
        lengths = [len(row.prompt) + len(row.output) + 1 for row in ROWS[part]]
        how = dict(lora_r=2, head_bias=False, loss=True)
        return sum(forward_account(tuned.model.config, 1, n, **how).forward + FOUR_BIT for n in lengths)

    assert spent["train"] == [3 * losses("train")] * 3 and spent["validate"] == [losses("validation")] * 3
    assert sum(spent["train"] + spent["validate"]) == tuned.history["flops"].iloc[-1]
    prompt = max(len(row.prompt) for row in ROWS["validation"])
    least, most = (
        generation_flops(tuned.model.config, 3, prompt, n, lora_r=2, head_bias=False) + n * FOUR_BIT for n in (1, 2)
    )
    assert len(spent["generate"]) == 2 and all(flops in (least, most) for flops in spent["generate"])


def test_matrix_products_of_a_step_are_those_that_the_counter_sees(base_folder):
    """Over the full-precision base: in four bits each matrix is put together first, and its product is the same."""
    settings = replace(QUICK, four_bit=False, lora_r=16, lora_dropout=0.0)
    base = load_for_tuning(str(base_folder), settings)
    base.model.set_attn_implementation("eager")
    model = add_adapter(base.model, settings)
    ids = torch.arange(48).reshape(2, 24)
    with FlopCounterMode(display=False) as forward:
        loss = model(input_ids=ids, labels=ids).loss
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    account = forward_account(base.model.config, 2, 24, lora_r=16, head_bias=False, loss=True)
    assert forward.get_total_flops() == sum(account.matmuls.values())
    assert backward.get_total_flops() == lora_backward_flops(base.model.config, 2, 24, lora_r=16)


def test_a_killed_run_resumes_to_equal_weights(whole, base_folder, tmp_path):
    folder, tuned, _ = whole
    ledger = Ledger(tmp_path / "ledger.sqlite")
    program = f"""
import os, signal
from m2helpers.instruct import quantised, rows, tuning
from m2helpers.ledger import Ledger
from m2helpers.settings import InstructSettings
steps, step = [], tuning._Trainer.training_step
def killed(*args, **named):
    steps.append(1)
    if len(steps) == 10:  # of 7 an epoch
        os.kill(os.getpid(), signal.SIGKILL)
    return step(*args, **named)
tuning._Trainer.training_step = killed
settings = {QUICK!r}
data = {{part: rows.read_rows(path) for part, path in {{"train": "train.jsonl", "validation": "val.jsonl"}}.items()}}
base = quantised.load_for_tuning({str(base_folder)!r}, settings)
tuning.tune(base, data, settings, "run", progress=False, ledger=Ledger("ledger.sqlite"))
"""
    _write_rows(tmp_path)
    environment = os.environ | {"PYTHONPATH": str(CHECKOUT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    run = tmp_path / "run"
    assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-4"]
    with pytest.raises(UserError, match="add --resume"):
        _tune(run, base_folder, ledger)
    with pytest.raises(UserError, match=r"other settings \(lora_dropout 0.05 then, 0.1 now\)"):
        _tune(run, base_folder, ledger, replace(QUICK, lora_dropout=0.1), resume=True)
    resumed = _tune(run, base_folder, ledger, resume=True)
    assert _same(_weights(run), _weights(folder))
    assert resumed.history.equals(tuned.history) and resumed.metrics == tuned.metrics
    assert [e["kind"] for e in ledger.entries() if e["state"] == "lost"] == ["train", "validate"]
    with pytest.raises(UserError, match="holds a finished run"):
        _tune(run, base_folder, ledger)


@pytest.mark.parametrize(
    "asked, said",
    [
        (9, "run: stopped at step 5 of 12; --resume goes on after epoch 1"),
        (1, "run: stopped at step 1 of 12; nothing is saved before the first epoch ends: begin again"),
    ],
)
def test_a_stop_waits_for_the_step_and_says_how_to_go_on(asked, said, base_folder, tmp_path, monkeypatch):
    steps, step = [], tuning._Trainer.training_step

    def interrupted(*args, **named):
        steps.append(1)
        if len(steps) == asked:
            signal.raise_signal(signal.SIGTERM)
        return step(*args, **named)

    ledger = Ledger(tmp_path / "ledger.sqlite")
    monkeypatch.setattr(tuning._Trainer, "training_step", interrupted)
    with pytest.raises(Stopped, match=f"^{said}$"):
        _tune(tmp_path / "run", base_folder, ledger)
    assert {entry["state"] for entry in ledger.entries()} == {"settled"}  # what was done, and no more


def test_an_epoch_that_does_not_fit_under_the_cap_is_not_begun(whole, base_folder, tmp_path):
    _, _, ledger = whole
    epochs = [e["flops"] for e in ledger.entries() if e["kind"] == "train"]
    small = Ledger(tmp_path / "ledger.sqlite", cap=2 * epochs[0])
    with pytest.raises(CapReached, match=r"stopped at step 4 of 12; --resume goes on after epoch 1\. "):
        _tune(tmp_path / "run", base_folder, small)
    assert small.spent() <= small.cap


def test_the_base_is_untouched_and_the_seed_is_all_that_varies(whole, base_folder, tmp_path):
    folder, _, _ = whole
    base = load_for_tuning(str(base_folder), QUICK)
    before = {name: p.detach().clone() for name, p in base.model.named_parameters()}
    ledger = Ledger(tmp_path / "ledger.sqlite")
    tune(base, ROWS, QUICK, tmp_path / "again", progress=False, ledger=ledger)
    after = {name.replace(".base_layer", ""): p for name, p in base.model.named_parameters() if "lora_" not in name}
    assert _same(before, after)
    zips = [path / "adaptermodel.zip" for path in (folder, tmp_path / "again")]
    cards = [path / "adapters" / "README.md" for path in (folder, tmp_path / "again")]
    assert cards[0].read_text().replace("# run:", "# again:") == cards[1].read_text()
    folders.write_zip(tmp_path / "again" / "adapters", zips[1])
    cards[1].write_bytes(cards[0].read_bytes())
    folders.write_zip(tmp_path / "again" / "adapters", zips[1])
    assert zips[0].read_bytes() == zips[1].read_bytes()
    _tune(tmp_path / "other", base_folder, ledger, replace(QUICK, seed=1))
    assert not _same(_weights(tmp_path / "again"), _weights(tmp_path / "other"))


def test_plain_peft_opens_the_zip_over_either_base(whole, base_folder, tmp_path):
    """In a process of its own that knows nothing of this package."""
    folder, _, _ = whole
    with zipfile.ZipFile(folder / "adaptermodel.zip") as archive:
        archive.extractall(tmp_path)
    program = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
folder, bits = sys.argv[1:]
four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
for how in ({"quantization_config": four}, {}):
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map={"": "cpu"}, **how)
    tokenizer = AutoTokenizer.from_pretrained("adapters")
    ids = tokenizer("1,2;", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        plain = base(ids).logits
        adapted = PeftModel.from_pretrained(base, "adapters").eval()(ids).logits
    assert not torch.allclose(plain, adapted), "the adapter changes nothing"
    torch.save(adapted, "full.pt" if not how else "four.pt")
assert not any(name.startswith("m2helpers") for name in sys.modules)
"""
    run = [sys.executable, "-c", program, str(base_folder), "4"]
    done = subprocess.run(run, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # By hand: the update of each layer added to the full-precision weights.
    base, weights = load_for_tuning(str(base_folder), replace(QUICK, four_bit=False)), _weights(folder)
    for name, b in weights.items():
        if ".lora_B." in name:
            target = name.removeprefix("base_model.model.").replace(".lora_B", "")
            update = b @ weights[name.replace("lora_B", "lora_A")] * (QUICK.lora_alpha / QUICK.lora_r)
            base.model.get_parameter(target).data += update
    ids = base.tokenizer("1,2;", return_tensors="pt")["input_ids"]
    full, four = (torch.load(tmp_path / name, weights_only=True) for name in ("full.pt", "four.pt"))
    with torch.no_grad():
        assert torch.allclose(base.model(ids).logits, full, atol=1e-3)
    assert not torch.equal(full, four)


@pytest.mark.parametrize("four_bit", [1, 0])
def test_the_command_tunes_a_qwen_15b_in_miniature(four_bit, base_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("M2_LEDGER", str(tmp_path / "ledger.sqlite"))
    command = ["instruct", "--output-dir", str(tmp_path / "run"), "--model", str(base_folder)]
    command += [*_write_rows(tmp_path), "--epochs=1", f"--four-bit={four_bit}", "--answers=1"]
    assert main(command) == 0
    out, err = capsys.readouterr()
    assert out.startswith("trainable params: 19,456 || all params: ") and "adaptermodel.zip" in out
    assert not [line for line in err.splitlines() if line.strip() and "step" not in line]  # the bar, and nothing else
    assert read_json(tmp_path / "run" / "instruct.json")["settings"]["learning_rate"] == 2e-4


def test_tokens_that_a_base_never_read_can_be_trained(base_folder, tmp_path):
    """Their embeddings, and nothing else of the base: the tokens of the rows, their template and the end."""
    settings = replace(QUICK, train_tokens=True, epochs=1)
    base = load_for_tuning(str(base_folder), settings)
    before = base.model.get_input_embeddings().weight.detach().clone()
    tuned = tune(base, ROWS, settings, tmp_path / "run", progress=False, ledger=Ledger(tmp_path / "ledger.sqlite"))
    used = {token for row in ROWS["train"] for token in base.tokenizer(row.prompt + row.output)["input_ids"]} | {258}
    assert tuned.metrics["trainable"] == 2 * 2 * (192 * 3 + 32) + 192 * len(used)
    delta = _weights(tmp_path / "run")["base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"]
    assert delta.shape == (len(used), 192) and not torch.equal(delta, before[sorted(used)])
    kept = {
        name: p
        for name, p in base.model.named_parameters()
        if name.endswith("embed_tokens.token_adapter.base_layer.weight")
    }
    assert kept and all(torch.equal(p, before) for p in kept.values())


def test_without_bitsandbytes_one_line_says_what_to_install(base_folder, tmp_path, monkeypatch, capsys):
    command = ["instruct", "--output-dir", str(tmp_path / "run"), "--model", str(base_folder), *_write_rows(tmp_path)]
    for found, says in (
        (None, "needs bitsandbytes;"),
        (OSError("no\nlibrary"), "does not work on this machine (no library)"),
    ):
        monkeypatch.setattr(quietly, "import_bitsandbytes", lambda found=found: found)
        assert main(command) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert says in line and "pip install m2helpers[qlora]" in line and "--four-bit 0" in line
