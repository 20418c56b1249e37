"""Folders of every other kind, given as a base: one line that says what is there and what to do."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from m2helpers.engine.modelfiles import check_adapter
from m2helpers.files import UserError
from m2helpers.models import embedded_tokenizer, load_base, load_config

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 988097824\n"
OWN_CODE = "needs code of its own (auto_map), which is never run here; choose a model whose architecture"


@pytest.fixture
def folder(tiny_folder, tmp_path):
    """A copy of the tiny base that a test may damage."""
    return shutil.copytree(tiny_folder, tmp_path / "folder")


def _configure(folder, file="config.json", **changes):
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _refusal(load, folder):
    with pytest.raises(UserError) as error:
        load(str(folder))
    assert str(error.value).startswith(str(folder)) and "\n" not in str(error.value)
    return str(error.value)


# ---------------------------------------------------------------- weights that are not read


@pytest.mark.parametrize("file", ["model.gguf", "pytorch_model.bin", "consolidated.pth", "consolidated.safetensors"])
def test_weights_of_another_format_are_named(folder, file):
    (folder / "model.safetensors").rename(folder / file)
    said = _refusal(load_base, folder)
    assert f"no model*.safetensors weights in {folder}, only {file}, which is not read here" in said


def test_a_file_is_not_a_folder(folder):
    assert "is a file; give a folder in hub format" in _refusal(load_base, folder / "model.safetensors")
    assert "is a file" in _refusal(load_config, folder / "config.json")


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_pointer_of_git_lfs_is_named(folder, file):
    (folder / file).write_bytes(POINTER)
    assert f"{file} is a Git LFS pointer, not the file itself; run 'git lfs pull'" in _refusal(load_base, folder)
    assert f"{file} is a Git LFS pointer" in _refusal(load_config, folder)


def test_missing_shards_are_counted(tiny_base, tmp_path):
    base = tiny_base(head_bias=False)
    base.model.save_pretrained(tmp_path, max_shard_size="40KB")
    base.tokenizer.save_pretrained(tmp_path)
    shards = sorted(tmp_path.glob("model-*"))
    shards[1].unlink()
    said = _refusal(load_base, tmp_path)
    assert f"{shards[1].name} is not in {tmp_path}, one of 1 missing of the {len(shards)} files that model" in said
    for shard in shards[2:] + shards[:1]:
        shard.unlink()
    assert f"one of {len(shards)} missing of the {len(shards)} files" in _refusal(load_base, tmp_path)  # an index alone


@pytest.mark.parametrize(
    "file, content, method",
    [
        ("config.json", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq"),
        ("config.json", {"quantization_config": {"quant_method": "awq", "bits": 4}}, "awq"),
        (
            "config.json",
            {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
            "bitsandbytes",
        ),
        ("config.json", {"quantization_config": {"load_in_8bit": True}}, "quantization_config"),
        ("quantize_config.json", {"bits": 4}, "GPTQ"),
    ],
)
def test_quantised_weights_are_named(folder, file, content, method):
    if not (folder / file).is_file():
        (folder / file).write_text("{}")
    _configure(folder, file, **content)
    assert f"its weights are quantised ({method}), which is not read here; choose the model" in _refusal(
        load_base, folder
    )


def test_no_quantisation_is_no_reason(folder):
    _configure(folder, quantization_config=None)
    assert load_base(str(folder)).sha256


# ---------------------------------------------------------------- other architectures


def test_an_unknown_architecture_is_named(folder):
    _configure(folder, model_type="brandnew", architectures=["BrandNewForCausalLM"])
    for load in (load_base, load_config):
        said = _refusal(load, folder)
        assert "has no architecture 'brandnew'; choose another base" in said and "transformers 5" in said


def test_an_encoder_decoder_is_named(tmp_path):
    sizes = dict(vocab_size=259, d_model=16, d_ff=16, d_kv=8, num_layers=1, num_heads=2)
    T5ForConditionalGeneration(T5Config(**sizes)).save_pretrained(tmp_path)
    assert "T5ForConditionalGeneration is not a causal language model" in _refusal(load_base, tmp_path)


@pytest.mark.parametrize("changes, said", [({"hidden_size": "wide"}, "hidden_size"), ({"dtype": "float99"}, "float99")])
def test_a_config_of_nonsense_is_one_line(folder, changes, said):
    _configure(folder, **changes)
    assert said in _refusal(load_base, folder)


def test_a_config_that_is_a_list_is_one_line(folder):
    (folder / "config.json").write_text("[]")
    assert "fetch or copy the model again" in _refusal(load_base, folder)
    assert "no usable config.json" in _refusal(load_config, folder)


def test_layers_of_gpt2_are_named_when_they_are_to_be_adapted(tmp_path):
    from m2helpers.lora import apply_lora
    from m2helpers.settings import LoraSettings

    GPT2LMHeadModel(GPT2Config(vocab_size=259, n_embd=16, n_layer=1, n_head=2)).save_pretrained(tmp_path)
    embedded_tokenizer().save_pretrained(tmp_path)
    model = load_base(str(tmp_path)).model
    for target in ("c_attn", "q_proj"):
        with pytest.raises(
            UserError, match=rf"'{target}': the model has no such linear layer, only Conv1D; choose a base"
        ):
            apply_lora(model, LoraSettings(target_modules=(target,)))


# ---------------------------------------------------------------- tokenizers


@pytest.mark.parametrize("kept", [[], ["tokenizer_config.json"]])
def test_a_missing_tokenizer_is_said(folder, kept):
    for path in folder.glob("*token*"):
        if path.name not in kept:
            path.unlink()
    assert f"no tokenizer in {folder} (tokenizer.json); copy" in _refusal(load_base, folder)


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(folder):
    tokenizer = embedded_tokenizer()
    tokenizer.add_tokens(["<one>"])
    tokenizer.save_pretrained(folder)
    said = _refusal(load_base, folder)
    assert "the tokenizer has ids up to 259 and the model a vocabulary of 259; copy the tokenizer that belongs" in said


# ---------------------------------------------------------------- runs and adapters


def test_a_run_is_not_a_base(folder):
    _configure(folder, settings_sha256="0" * 64)
    assert f"holds a run, not a base; give 'forecast' or 'evaluate' --run {folder}" in _refusal(load_base, folder)
    with pytest.raises(UserError, match=rf"holds a run, with its base and scale; give --run {folder} alone"):
        check_adapter(folder)


def test_an_adapter_is_not_a_base(folder):
    (folder / "model.safetensors").unlink()
    (folder / "adapter_config.json").write_text("{}")
    for load in (load_base, load_config):
        assert f"holds a peft adapter, not a base; give 'forecast' or 'evaluate' --model BASE --adapter {folder}" in (
            _refusal(load, folder)
        )
    (folder / "config.json").unlink()
    assert "holds a peft adapter" in _refusal(load_base, folder)


def test_a_folder_that_is_no_adapter_is_refused(folder):
    with pytest.raises(UserError, match=r"no adapter \(adapter_config.json\) there; give the folder"):
        check_adapter(folder)
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.bin").write_bytes(b"\x80")
    with pytest.raises(UserError, match=r"adapter_model\.bin is pickled, and can run code when it is read"):
        check_adapter(folder)
    (folder / "adapter_model.safetensors").write_bytes(POINTER)
    with pytest.raises(UserError, match=r"adapter_model\.safetensors is a Git LFS pointer"):
        check_adapter(folder)


def test_an_adapter_beside_a_base_is_not_applied(folder, tiny_base):
    from peft import LoraConfig, get_peft_model

    plain = tiny_base()
    adapted = get_peft_model(tiny_base(head_bias=False).model, LoraConfig(target_modules=["q_proj", "v_proj"]))
    adapted.save_pretrained(folder)
    weights = load_file(folder / "adapter_model.safetensors")
    save_file({name: torch.ones_like(tensor) for name, tensor in weights.items()}, folder / "adapter_model.safetensors")
    with pytest.warns(UserWarning, match=rf"an adapter lies beside the weights; .* \(--adapter {folder} applies it\)"):
        base = load_base(str(folder))
    assert base.sha256 == plain.sha256
    assert [name for name, _ in base.model.named_parameters()] == [name for name, _ in plain.model.named_parameters()]
    ids = torch.arange(15, 25)[None]
    assert torch.equal(base.model(ids).logits, plain.model(ids).logits)


# ---------------------------------------------------------------- code

LEAVES_A_MARK = """
import pathlib
pathlib.Path({mark!r}).touch()
from transformers import Qwen2Config as Config, Qwen2ForCausalLM as Model, Qwen2Tokenizer as Tokenizer
def generate(**_): raise SystemExit
"""


class _Terminal:
    """Standard input that answers yes to everything, and remembers that it was asked."""

    asked = False

    def readline(self, *_):
        self.asked = True
        return "y\n"

    def fileno(self):
        raise OSError  # so that `input` reads from here


@pytest.fixture
def terminal(monkeypatch, tmp_path):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("sys.stdin", terminal := _Terminal())
    return terminal


@pytest.fixture
def with_code(folder, tmp_path):
    """A folder with code that leaves a mark if it is run, and where that mark would be."""
    (folder / "code.py").write_text(LEAVES_A_MARK.format(mark=str(tmp_path / "mark")))
    (folder / "custom_generate").mkdir()
    shutil.copy(folder / "code.py", folder / "custom_generate" / "generate.py")
    return folder, tmp_path / "mark"


CODE = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}


@pytest.mark.parametrize(
    "file, changes",
    [
        ("config.json", {"model_type": "own", "architectures": ["Own"], "auto_map": CODE}),
        ("config.json", {"model_type": "own", "auto_map": {"AutoModelForCausalLM": "code.Model"}}),
        ("config.json", {"model_type": None, "architectures": ["Own"], "auto_map": CODE}),
        ("config.json", {"architectures": ["Own"], "auto_map": CODE}),
        ("config.json", {"model_type": "vit", "auto_map": CODE}),
    ],
)
def test_a_model_with_code_of_its_own_is_refused_and_nothing_is_asked(with_code, terminal, file, changes):
    folder, mark = with_code
    _configure(folder, file, **changes)
    assert OWN_CODE in _refusal(load_base, folder)
    assert not mark.exists() and not terminal.asked


def test_a_tokenizer_with_code_of_its_own_is_refused_and_nothing_is_asked(with_code, terminal):
    folder, mark = with_code
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    LlamaForCausalLM(LlamaConfig(vocab_size=259, **sizes)).save_pretrained(folder)  # of no tokenizer by itself
    own = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["code.Tokenizer", None]}}
    _configure(folder, "tokenizer_config.json", **own)
    assert OWN_CODE in _refusal(load_base, folder)
    assert not mark.exists() and not terminal.asked


def test_code_is_not_run_where_transformers_has_the_architecture(with_code, terminal):
    folder, mark = with_code
    _configure(folder, auto_map=CODE)
    _configure(folder, "tokenizer_config.json", auto_map={"AutoTokenizer": ["code.Tokenizer", None]})
    base = load_base(str(folder))
    assert type(base.model).__module__ == "transformers.models.qwen2.modeling_qwen2"
    load_config(str(folder))
    assert not mark.exists() and not terminal.asked


def test_a_kernel_named_by_a_folder_is_not_fetched(folder, monkeypatch):
    def fetch(name, **_):
        raise AssertionError(f"{name} was to be fetched and run")

    monkeypatch.setattr("transformers.modeling_utils.lazy_import_flash_attention", fetch)
    _configure(folder, attn_implementation="somebody/attention")
    assert load_base(str(folder)).model.config._attn_implementation == "sdpa"
