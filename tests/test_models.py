"""Base models: the embedded tokenizer, the head bias, loading from folders and hub, and every refusal."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from m2helpers import models, paths
from m2helpers.files import UserError, sha256_file
from m2helpers.flops.architecture import QWEN_05B
from m2helpers.models import add_head_bias, embedded_config, embedded_tokenizer, load_base, load_config

TEXT = "1.16,-1.27;0.90,0.95;"


@pytest.fixture
def copy(tiny_folder, tmp_path):
    """A copy of the tiny base that a test may damage."""
    return shutil.copytree(tiny_folder, tmp_path / "copy")


def _logits(base):
    with torch.no_grad():
        return base.model(torch.tensor([base.tokenizer(TEXT)["input_ids"]])).logits


# ---------------------------------------------------------------- tokenizer


def test_numeric_text_has_the_ids_of_qwen25():
    tokenizer = embedded_tokenizer()
    assert type(tokenizer) is Qwen2Tokenizer
    assert tokenizer("1.23")["input_ids"] == [16, 13, 17, 18]
    assert tokenizer("0123456789")["input_ids"] == list(range(15, 25))
    assert tokenizer(".,;-")["input_ids"] == [13, 11, 26, 12]


def test_the_vocabulary_is_the_bytes_and_the_special_tokens():
    tokenizer = embedded_tokenizer()
    assert len(tokenizer) == 259 == embedded_config().vocab_size
    text = "".join(map(chr, range(32, 127))) + "\n\té€😀"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text.encode()) and max(ids) < 256
    assert tokenizer.decode(ids) == text
    assert tokenizer("<|endoftext|><|im_start|><|im_end|>")["input_ids"] == [256, 257, 258]
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 256


def test_the_tokenizer_survives_saving(tmp_path):
    embedded_tokenizer().save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert isinstance(loaded, Qwen2Tokenizer)
    assert loaded(TEXT)["input_ids"] == embedded_tokenizer()(TEXT)["input_ids"]
    assert loaded.decode(loaded(TEXT)["input_ids"]) == TEXT
    assert loaded.pad_token_id == 256


# ---------------------------------------------------------------- head bias


def test_the_head_bias_changes_nothing_at_first(tiny_base):
    plain, biased = tiny_base(head_bias=False), tiny_base()
    assert plain.model.lm_head.bias is None
    assert torch.equal(_logits(plain), _logits(biased))
    bias = biased.model.lm_head.bias
    assert bias.shape == (259,) and bias.requires_grad and not bias.any()
    assert "lm_head.bias" in dict(biased.model.named_parameters())


def test_the_head_bias_leaves_the_tie(tiny_base):
    model = tiny_base().model
    assert model.lm_head.weight is model.model.embed_tokens.weight
    names = [name for name, _ in model.named_parameters()]
    assert "lm_head.weight" not in names and names.count("model.embed_tokens.weight") == 1
    with torch.no_grad():
        model.model.embed_tokens.weight[5, 5] = 7.0
    assert model.lm_head.weight[5, 5] == 7.0


def test_the_head_bias_is_added_to_the_logits(tiny_base):
    base = tiny_base()
    before = _logits(base)
    with torch.no_grad():
        base.model.lm_head.bias.copy_(torch.arange(259.0))
    torch.testing.assert_close(_logits(base) - before, torch.arange(259.0).expand_as(before), atol=1e-4, rtol=0)
    base.model.lm_head(torch.ones(1, 32)).sum().backward()
    assert torch.equal(base.model.lm_head.bias.grad, torch.ones(259))


def test_the_head_bias_is_added_once(tiny_base):
    model = tiny_base().model
    with torch.no_grad():
        model.lm_head.bias.fill_(3.0)
    head = model.lm_head
    assert add_head_bias(model) is model and model.lm_head is head and head.bias.eq(3.0).all()


def test_qwen25_05b_has_its_published_size():
    with torch.device("meta"):
        model = Qwen2ForCausalLM(Qwen2Config(**QWEN_05B))
    assert sum(p.numel() for p in model.parameters()) == 494_032_768
    add_head_bias(model)
    assert sum(p.numel() for p in model.parameters()) == 494_032_768 + 151_936
    assert model.lm_head.bias.device.type == "meta"


def test_the_embedded_architecture_is_qwens_and_small():
    with torch.device("meta"):
        model = Qwen2ForCausalLM(embedded_config())
    assert 2e6 < sum(p.numel() for p in model.parameters()) < 8e6
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    assert model.config.tie_word_embeddings and model.lm_head.weight is model.model.embed_tokens.weight


# ---------------------------------------------------------------- loading


def test_a_folder_in_hub_format_loads(tiny_folder):
    base = load_base(str(tiny_folder))
    saved = load_file(tiny_folder / "model.safetensors")
    for name, tensor in saved.items():
        assert torch.equal(base.model.get_parameter(name), tensor), name
    assert not base.model.training and base.model.dtype == torch.float32
    assert base.name == str(tiny_folder) and base.short_name == "tiny" and base.pad_id == 256
    assert base.sha256 == sha256_file(tiny_folder / "model.safetensors")
    assert load_config(str(tiny_folder)).hidden_size == 32


def test_a_large_model_is_loaded_in_bfloat16_where_that_is_faster(tiny_base, monkeypatch):
    monkeypatch.setattr("m2helpers.models.LARGE", 1000)
    monkeypatch.setattr("m2helpers.models.has_bfloat16", lambda device: True)
    model = tiny_base().model
    assert model.dtype == torch.bfloat16 and model.lm_head.bias.dtype == torch.float32
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert tiny_base(dtype="float32").model.dtype == torch.float32
    monkeypatch.setattr("m2helpers.models.has_bfloat16", lambda device: False)
    assert tiny_base().model.dtype == torch.float32
    with pytest.raises(UserError, match="dtype 'float16': choose float32 or bfloat16"):
        tiny_base(dtype="float16")


def test_precision_and_device_can_be_chosen(tiny_base, monkeypatch):
    monkeypatch.setenv("M2_DTYPE", "bfloat16")
    monkeypatch.setenv("M2_DEVICE", "cpu")
    assert tiny_base().model.dtype == torch.bfloat16 and tiny_base().model.device.type == "cpu"
    assert tiny_base(dtype="float32").model.dtype == torch.float32
    monkeypatch.setenv("M2_DEVICE", "abacus")
    with pytest.raises(UserError, match=r"M2_DEVICE 'abacus': this machine has .*cpu"):
        tiny_base()
    monkeypatch.setenv("M2_DEVICE", "cpu")
    monkeypatch.setenv("M2_DTYPE", "float64")
    with pytest.raises(UserError, match="dtype 'float64': choose float32 or bfloat16"):
        tiny_base()


def test_too_little_memory_is_said_before_loading(tiny_base, monkeypatch):
    monkeypatch.setattr("m2helpers.models.psutil.virtual_memory", lambda: SimpleNamespace(available=10))
    with pytest.raises(UserError, match=r"weights need .* GB of memory and 0.0 GB are free; close other programs"):
        tiny_base()


def test_a_sharded_folder_loads(tiny_base, tmp_path):
    base = tiny_base(head_bias=False)
    base.model.save_pretrained(tmp_path, max_shard_size="40KB")
    base.tokenizer.save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    sharded = load_base(str(tmp_path))
    assert torch.equal(_logits(sharded), _logits(base))
    assert len(sharded.sha256) == 64 and sharded.sha256 != base.sha256
    assert load_base(str(tmp_path)).sha256 == sharded.sha256


def test_other_files_beside_the_weights_do_not_change_the_hash(copy, tiny_base):
    save_file({"weight.a": torch.zeros(2)}, copy / "state.safetensors")
    save_file({"a": torch.zeros(2)}, copy / "adapter_model.safetensors")
    assert load_base(str(copy)).sha256 == tiny_base().sha256


def test_the_environment_names_the_default(tiny_folder, monkeypatch):
    assert models.default_model() == "embedded"
    monkeypatch.setenv("M2_MODEL", str(tiny_folder))
    assert models.default_model() == str(tiny_folder)
    assert load_base().name == str(tiny_folder)
    monkeypatch.setenv("M2_MODEL", "")
    assert models.default_model() == "embedded"


def test_embedded_is_the_shipped_folder(tiny_folder, monkeypatch):
    monkeypatch.setattr(paths, "EMBEDDED_BASE", tiny_folder)
    base = load_base("embedded")
    assert base.short_name == "embedded" and base.sha256 == load_base(str(tiny_folder)).sha256


def test_a_folder_named_by_dots_is_called_by_its_own_name(tiny_folder, monkeypatch):
    monkeypatch.chdir(tiny_folder)
    assert load_base(".").short_name == tiny_folder.name


def test_a_hub_name_is_taken_from_the_cache_first(tiny_folder, monkeypatch):
    calls = []

    def download(name, allow_patterns, local_files_only=False):
        calls.append((name, local_files_only))
        return str(tiny_folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    base = load_base("someone/tiny-model")
    assert base.name == "someone/tiny-model" and base.short_name == "tiny-model"
    assert calls == [("someone/tiny-model", True)]


def test_a_cache_without_weights_is_completed(tiny_folder, tmp_path, monkeypatch):
    """A cache that holds a model's config alone, because someone asked for that, is not the model."""
    shutil.copy(tiny_folder / "config.json", tmp_path)
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download",
        lambda name, allow_patterns, local_files_only=False: str(tmp_path if local_files_only else tiny_folder),
    )
    assert load_base("someone/tiny-model").model.config.hidden_size == 32


def test_a_configuration_is_fetched_without_the_weights(tiny_folder, monkeypatch):
    def download(name, allow_patterns, local_files_only=False):
        assert allow_patterns == ["config.json"]
        if local_files_only:
            raise FileNotFoundError
        return str(tiny_folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert load_config("someone/large-model").hidden_size == 32


# ---------------------------------------------------------------- refusals


def _refusal(name):
    with pytest.raises(UserError) as error:
        load_base(str(name))
    message = str(error.value)
    assert message.startswith(str(name)) and "\n" not in message
    return message


@pytest.mark.parametrize("name", ["/no/such/folder", "./none", "a/b/c", "none"])
def test_a_missing_folder_is_refused(name):
    assert "no such folder; give 'embedded', a hub name" in _refusal(name)


def test_a_folder_without_weights_is_refused(copy):
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    assert "no model*.safetensors weights in" in _refusal(copy)
    (copy / "config.json").unlink()
    assert "hub format" in _refusal(copy)


def test_a_folder_without_config_is_refused(copy):
    (copy / "config.json").unlink()
    assert "no config.json in" in _refusal(copy)
    with pytest.raises(UserError, match=r"no usable config\.json"):
        load_config(str(copy))


@pytest.mark.parametrize("architectures", [["Qwen2ForSequenceClassification"], ["Qwen2Model"], None])
def test_a_model_that_does_not_write_text_is_refused(copy, architectures):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"architectures": architectures}))
    message = _refusal(copy)
    assert "is not a causal language model; choose one" in message
    assert (architectures or ["an unnamed architecture"])[0] in message


def _cut_short(folder):
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])


def _lose_a_matrix(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _change_the_size(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 40}))


def _break_the_config(folder):
    (folder / "config.json").write_text("{")


def _make_it_a_run(folder):
    (folder / "config.json").write_text('{"settings": {}}')


@pytest.mark.parametrize(
    "damage, said",
    [
        (_cut_short, "not fully covered"),
        (_lose_a_matrix, "the weights lack model.layers.1.mlp.up_proj.weight"),
        (_change_the_size, "down_proj.weight is (32, 48) in the weights and (32, 40) by config.json"),
        (_break_the_config, "not a valid JSON"),
        (_make_it_a_run, "Unrecognized model"),
    ],
)
def test_a_damaged_model_is_refused(copy, damage, said):
    damage(copy)
    message = _refusal(copy)
    assert said in message and "fetch or copy the model again" in message


def test_a_missing_shard_is_refused(tiny_base, tmp_path):
    base = tiny_base(head_bias=False)
    base.model.save_pretrained(tmp_path, max_shard_size="40KB")
    base.tokenizer.save_pretrained(tmp_path)
    min(tmp_path.glob("model-*")).unlink()
    assert "model-00001" in _refusal(tmp_path)


def test_a_hub_name_without_network_is_refused():
    message = _refusal("nobody-at-all/no-such-model")  # conftest has set HF_HUB_OFFLINE
    assert "not in the local cache and not fetched from the hub" in message
    assert message.endswith("connect and try again, or give a folder")


_ANSWER = SimpleNamespace(headers={}, request=None)


@pytest.mark.parametrize(
    ("failure", "remedy"),
    [
        (ConnectionError("no route\nto host"), "connect and try again"),
        (RepositoryNotFoundError("no such repository", response=_ANSWER), "check the name"),
        (
            GatedRepoError("access is restricted", response=_ANSWER),
            "accept its licence on its page and 'hf auth login'",
        ),
    ],
)
def test_any_failure_of_the_hub_is_one_line_with_its_remedy(monkeypatch, failure, remedy):
    def download(*_, **__):
        raise failure if not __.get("local_files_only") else FileNotFoundError

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    message = _refusal("someone/some-model")
    assert str(failure).splitlines()[0] in message and remedy in message and "\n" not in message


def test_an_impossible_hub_name_is_refused():
    assert "Repo id must use alphanumeric" in _refusal("some one/model!")
