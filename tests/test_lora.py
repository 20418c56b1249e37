"""LoRA: silent at the start, the base untouched, merging, and adapters that `peft` reads."""

import json
from dataclasses import fields, replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from m2helpers.files import UserError
from m2helpers.flops.architecture import QWEN_05B
from m2helpers.lora import (
    CheapDropout,
    adapter_settings,
    apply_lora,
    load_adapter,
    lora_layers,
    merge,
    parameter_report,
    save_adapter,
    trainable_parameters,
    unmerge,
)
from m2helpers.models import add_head_bias
from m2helpers.settings import LoraSettings

ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SETTINGS = LoraSettings(lora_r=3, lora_alpha=6.0, lora_dropout=0.1)
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft's
IDS = torch.randint(0, 256, (2, 17), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def _logits(model):
    return model.eval()(IDS).logits


def _disturb(model):
    """Give every trained parameter a nonzero value, as training would."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in trainable_parameters(model).values():
            p.add_(0.2 * torch.randn(p.shape, generator=generator))
    return model


@pytest.fixture
def adapted(tiny_base):
    """A tiny base with updates that are not zero."""
    base = tiny_base()
    torch.manual_seed(0)
    _disturb(apply_lora(base.model, SETTINGS))
    return base


@pytest.fixture
def folder(adapted, tmp_path):
    save_adapter(adapted.model, tmp_path / "run", SETTINGS, adapted.name, adapted.sha256)
    return tmp_path / "run"


# ---------------------------------------------------------------- the layer


def test_the_output_is_the_bases_at_start(tiny_base):
    plain = _logits(tiny_base(head_bias=False).model)
    model = apply_lora(tiny_base().model, replace(SETTINGS, target_modules=ALL_LINEAR))
    assert len(list(lora_layers(model))) == 2 * 7
    assert not any(module.training for module in model.modules())  # no dropout: the base was in evaluation mode
    assert torch.equal(_logits(model), plain)


def test_the_layer_is_its_formula():
    torch.manual_seed(0)
    base = nn.Linear(5, 4)
    weight, bias = base.weight.detach().clone(), base.bias.detach().clone()
    holder = nn.ModuleDict({"q_proj": base})
    holder.get_output_embeddings = lambda: nn.Linear(2, 2, bias=False)
    apply_lora(holder, LoraSettings(lora_r=2, lora_alpha=3.0, target_modules=("q_proj",)))
    layer = holder["q_proj"].eval()
    with torch.no_grad():
        layer.lora_B.weight.normal_()
    x = torch.randn(7, 5)
    expected = x @ weight.T + bias + 3.0 / 2 * x @ layer.lora_A.weight.T @ layer.lora_B.weight.T
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer.delta(), 1.5 * layer.lora_B.weight @ layer.lora_A.weight)


def test_training_leaves_the_base_bit_for_bit(tiny_base):
    model = apply_lora(tiny_base().model, replace(SETTINGS, target_modules=ALL_LINEAR)).train()
    trained = trainable_parameters(model)
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if n not in trained}
    start = {n: p.detach().clone() for n, p in trained.items()}
    optimizer = torch.optim.AdamW(trained.values(), lr=0.05, weight_decay=0.1)
    for _ in range(3):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = dict(model.named_parameters())
    assert all(torch.equal(after[n], p) for n, p in frozen.items())
    assert all(not torch.equal(after[n], p) for n, p in start.items())
    assert set(start) == {n for n in after if ".lora_" in n} | {"lm_head.bias"}
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_dropout_acts_in_training_only(adapted):
    model = adapted.model
    steady = _logits(model)
    assert torch.equal(_logits(model), steady)
    assert not torch.allclose(model.train()(IDS).logits, steady)


# ---------------------------------------------------------------- merging


def test_dropout_drops_its_share_and_keeps_the_mean():
    torch.manual_seed(0)
    x = torch.full((300, 1001), 2.0, requires_grad=True)
    dropout = CheapDropout(0.05)
    y = dropout(x)
    dropped = y == 0
    assert 0.045 < dropped.float().mean() < 0.055 and torch.allclose(y[~dropped], torch.tensor(2 / 0.95))
    columns = dropped.float().mean(0)
    assert columns.min() < 0.03 < 0.07 < columns.max()  # no pattern: as unequal as chance makes them
    assert not torch.equal(dropout(x) == 0, dropped)
    y.sum().backward()
    assert torch.equal(x.grad == 0, dropped)
    torch.manual_seed(0)
    assert torch.equal(dropout(x), y)
    assert torch.equal(dropout.eval()(x), x) and torch.equal(CheapDropout(0.0)(x), x)


def test_merged_logits_agree(adapted, tiny_base):
    apart = _logits(adapted.model)
    assert (apart - _logits(tiny_base().model)).abs().max() > 0.1
    assert merge(adapted.model) is adapted.model
    torch.testing.assert_close(_logits(adapted.model), apart, atol=1e-5, rtol=1e-5)


def test_merged_and_apart_agree_within_the_rounding_of_a_bfloat16_base(tiny_base):
    """Merging rounds every weight once to 8 bits, and apart, a layer's output is rounded once more."""
    torch.manual_seed(0)
    model = _disturb(apply_lora(tiny_base(dtype="bfloat16").model, replace(SETTINGS, target_modules=ALL_LINEAR)))
    for _, layer in lora_layers(model):
        x = torch.randn(50, layer.base.in_features, dtype=torch.bfloat16)
        with torch.no_grad():
            apart, base = layer.eval()(x).float(), layer.base(x).float()
            layer.merge()
            merged, size = layer(x).float(), x.float().abs() @ layer.base.weight.float().abs().T
        assert layer.base.weight.dtype == torch.bfloat16
        half = torch.finfo(torch.bfloat16).eps / 2  # the share by which one rounding can be off
        rounded = size + base.abs() + (apart - base).abs() + apart.abs() + merged.abs()
        assert ((merged - apart).abs() <= 1.1 * half * rounded).all()
        assert ((merged - base).abs() > 3 * half * rounded).float().mean() > 0.5  # the update is far more than that


def test_merging_twice_is_merging_once(adapted):
    once = {n: p.detach().clone() for n, p in merge(adapted.model).named_parameters()}
    twice = dict(merge(adapted.model).named_parameters())
    assert all(torch.equal(twice[n], p) for n, p in once.items())


def test_unmerging_gives_the_bits_back(adapted):
    before = {n: p.detach().clone() for n, p in adapted.model.named_parameters()}
    apart = _logits(adapted.model)
    merged = dict(merge(adapted.model).named_parameters())
    assert any(not torch.equal(merged[n], p) for n, p in before.items())
    unmerge(unmerge(adapted.model))
    after = dict(adapted.model.named_parameters())
    assert all(torch.equal(after[n], p) for n, p in before.items())
    assert torch.equal(_logits(adapted.model), apart)


# ---------------------------------------------------------------- what is adapted


def test_the_parameter_report_adds_up(tiny_base):
    base = tiny_base()
    total = sum(p.numel() for p in base.model.parameters()) - 259
    report = parameter_report(apply_lora(base.model, SETTINGS))
    lora = 2 * 3 * ((32 + 32) + (32 + 16))  # layers × rank × (in + out of q, and of v with its two heads of four)
    assert report == {"base": total, "lora": lora, "head_bias": 259, "trainable": lora + 259}


@pytest.mark.parametrize("rank, lora", [(8, 540_672), (4, 270_336)])
def test_qwen25_05b_trains_what_the_design_says(rank, lora):
    with torch.device("meta"):
        model = apply_lora(add_head_bias(Qwen2ForCausalLM(Qwen2Config(**QWEN_05B))), LoraSettings(lora_r=rank))
    report = parameter_report(model)
    assert report["base"] == 494_032_768 and report["lora"] == lora
    assert report["trainable"] == lora + 151_936 == sum(p.numel() for p in trainable_parameters(model).values())


def test_rank_zero_trains_the_bias_alone(tiny_base, tmp_path):
    base, settings = tiny_base(), LoraSettings(lora_r=0)
    _disturb(apply_lora(base.model, settings))
    assert list(trainable_parameters(base.model)) == ["lm_head.bias"] and not list(lora_layers(base.model))
    save_adapter(base.model, tmp_path, settings, base.name, base.sha256)
    again = tiny_base()
    assert load_adapter(again.model, tmp_path, again.sha256).lora_r == 0
    assert torch.equal(_logits(again.model), _logits(base.model))


@pytest.mark.parametrize(
    "settings, said",
    [
        (LoraSettings(target_modules=("q_proj", "w_proj")), r"'w_proj'.*choose from down_proj, gate_proj, k_proj"),
        (LoraSettings(target_modules=("lm_head",)), r"'lm_head'.*no such linear layer"),
        (LoraSettings(target_modules=("mlp",)), r"'mlp'.*no such linear layer"),
        (LoraSettings(lora_r=-1), r"lora_r -1: give 0"),
    ],
)
def test_impossible_settings_are_refused(tiny_base, settings, said):
    base = tiny_base()
    with pytest.raises(UserError, match=said):
        apply_lora(base.model, settings)
    assert not list(lora_layers(base.model))


def test_adapting_twice_is_refused(adapted):
    with pytest.raises(UserError, match="has LoRA updates already: load the base again"):
        apply_lora(adapted.model, SETTINGS)


# ---------------------------------------------------------------- adapters on disk


def test_saved_keys_are_exactly_the_lora_set_and_the_bias(folder):
    matrices = {
        f"base_model.model.model.layers.{layer}.self_attn.{name}.lora_{side}.weight"
        for layer in (0, 1)
        for name in ("q_proj", "v_proj")
        for side in "AB"
    }
    assert set(load_file(folder / "adapter_model.safetensors")) == matrices | {"base_model.model.lm_head.bias"}
    assert sorted(p.name for p in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


def test_an_adapter_loads_as_it_was(adapted, folder, tiny_base):
    again = tiny_base()
    assert load_adapter(again.model, folder, again.sha256) == SETTINGS
    assert torch.equal(_logits(again.model), _logits(adapted.model))


def test_saving_while_merged_saves_the_same(adapted, folder, tmp_path):
    save_adapter(merge(adapted.model), tmp_path / "merged", SETTINGS, adapted.name, adapted.sha256)
    names = "adapter_model.safetensors"
    assert (tmp_path / "merged" / names).read_bytes() == (folder / names).read_bytes()


@pytest.mark.slow
def test_peft_gives_our_logits(peft, adapted, folder, tiny_base):
    ours = _logits(adapted.model)
    assert adapted.model.lm_head.bias.abs().min() > 0
    assert all(layer.lora_B.weight.abs().min() > 0 for _, layer in lora_layers(adapted.model))
    theirs = peft.PeftModel.from_pretrained(add_head_bias(tiny_base(head_bias=False).model), folder)
    torch.testing.assert_close(_logits(theirs), ours, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_an_adapter_that_peft_wrote_loads(peft, adapted, folder, tiny_base, tmp_path):
    """`peft` does not know the head bias: its file has the matrices alone, and the bias stays zero."""
    peft.PeftModel.from_pretrained(add_head_bias(tiny_base().model), folder).save_pretrained(tmp_path / "peft")
    assert set(load_file(tmp_path / "peft" / "adapter_model.safetensors")) < set(
        load_file(folder / "adapter_model.safetensors")
    )
    again = tiny_base()
    load_adapter(again.model, tmp_path / "peft", again.sha256)
    assert not again.model.lm_head.bias.any()
    with torch.no_grad():
        adapted.model.lm_head.bias.zero_()
    assert torch.equal(_logits(again.model), _logits(adapted.model))


@pytest.mark.slow
def test_an_adapter_that_peft_trained_loads(peft, tiny_base, tmp_path):
    """Two optimizer steps by `peft` alone, saved by `peft`: our logits are its own."""
    config = peft.LoraConfig(r=3, lora_alpha=6, lora_dropout=0.0, target_modules=["q_proj", "down_proj"])
    torch.manual_seed(0)
    theirs = peft.get_peft_model(tiny_base(head_bias=False).model, config)
    optimizer = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        theirs(IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    theirs.save_pretrained(tmp_path / "peft")
    ours = tiny_base()
    assert load_adapter(ours.model, tmp_path / "peft", ours.sha256).lora_r == 3
    torch.testing.assert_close(_logits(ours.model), _logits(theirs), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(_logits(ours.model), _logits(tiny_base().model), atol=1e-2)


def test_a_pattern_of_target_modules_is_refused(adapted, folder, tiny_base):
    """`peft` takes a regular expression there as well."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"target_modules": ".*q_proj"}))
    assert "target_modules '.*q_proj'" in _refusal(tiny_base(), folder)


PLAIN = dict(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
LARGER = dict(r=64, lora_alpha=128)


def _by_peft(peft, base, folder, **options):
    """An adapter that `peft` made with these options, its matrices moved as training would, and the logits it gives."""
    torch.manual_seed(0)
    model = peft.get_peft_model(base(head_bias=False).model, peft.LoraConfig(**(PLAIN | options)))
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape))
    model.save_pretrained(folder)
    return _logits(peft.PeftModel.from_pretrained(base(head_bias=False).model, folder))


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        LARGER,
        dict(target_modules="all-linear"),
        dict(target_modules=["self_attn.q_proj", "model.layers.0.mlp.up_proj", "layers.1.mlp.up_proj"]),
        dict(task_type=None),
        dict(fan_in_fan_out=True),  # which peft itself corrects for linear layers
        *(dict(init_lora_weights=start) for start in ("gaussian", "orthogonal", "eva", "mica", False)),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore")  # peft's own, of some options
def test_an_adapter_of_plain_lora_loads_with_no_difference(peft, tiny_base, tmp_path, options):
    theirs = _by_peft(peft, tiny_base, tmp_path, **options)
    ours = tiny_base()
    load_adapter(ours.model, tmp_path, ours.sha256)
    assert torch.equal(_logits(ours.model), theirs)
    assert (theirs - _logits(tiny_base().model)).abs().max() > 0.01


@pytest.mark.slow
@pytest.mark.parametrize(
    "options, said",
    [
        (dict(use_rslora=True), "use_rslora"),
        (dict(use_dora=True), "use_dora"),
        (dict(bias="lora_only"), "bias 'lora_only'"),
        (dict(bias="all"), "bias 'all'"),
        (dict(lora_bias=True), "lora_bias"),
        (dict(modules_to_save=["lm_head"]), "modules_to_save"),
        (dict(trainable_token_indices=[15, 16]), "trainable_token_indices"),
        (dict(layers_to_transform=[0]), "layers_to_transform"),
        (dict(layers_to_transform=0), "layers_to_transform"),
        (dict(exclude_modules=["layers.0.self_attn.q_proj"]), "exclude_modules"),
        (dict(rank_pattern={"q_proj": 2}), "rank_pattern"),
        (dict(alpha_pattern={"q_proj": 2}), "alpha_pattern"),
        (dict(init_lora_weights="pissa"), "init_lora_weights 'pissa'"),
        (dict(init_lora_weights="olora"), "init_lora_weights 'olora'"),
        (dict(ensure_weight_tying=True), "ensure_weight_tying"),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore")
def test_an_adapter_of_another_option_is_refused_by_its_name(peft, tiny_base, tmp_path, options, said):
    _by_peft(peft, tiny_base, tmp_path, **options)
    base = tiny_base()
    message = _refusal(base, tmp_path)
    assert message == f"{tmp_path / 'adapter_config.json'}: {said} is not supported here; load this adapter with peft"
    assert not list(lora_layers(base.model))


@pytest.mark.slow
@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
@pytest.mark.filterwarnings("ignore")
def test_an_adapter_of_other_layers_is_refused(peft, tiny_base, tmp_path, target):
    _by_peft(peft, tiny_base, tmp_path, target_modules=[target])
    message = _refusal(tiny_base(), tmp_path)
    assert f"target_modules {target!r}: the model has no such linear layer" in message
    assert message.endswith("; load this adapter with peft, on the base it was trained on")


@pytest.mark.slow
def test_an_adapter_of_some_layers_is_refused(peft, tiny_base, tmp_path):
    _by_peft(peft, tiny_base, tmp_path, target_modules=["layers.0.self_attn.q_proj"])
    message = _refusal(tiny_base(), tmp_path)
    assert "target_modules is not supported here where it leaves out layers" in message and "with peft" in message


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, options",
    [("IA3Config", dict(feedforward_modules=[])), ("LoHaConfig", {}), ("AdaLoraConfig", dict(total_step=9))],
)
def test_an_adapter_that_is_not_lora_is_refused_by_its_name(peft, tiny_base, tmp_path, name, options):
    config = getattr(peft, name)(target_modules=["q_proj"], **options)
    kind = config.peft_type.value
    peft.get_peft_model(tiny_base(head_bias=False).model, config).save_pretrained(tmp_path)
    assert f"peft_type {kind!r} is not supported here; load this adapter with peft" in _refusal(tiny_base(), tmp_path)


@pytest.mark.slow
def test_every_option_of_peft_is_known_or_refused(peft, folder):
    """Also those that only a later version has: none is passed over."""
    path = folder / "adapter_config.json"
    plain = json.loads(path.read_text())
    without_effect = {"auto_mapping", "base_model_name_or_path", "eva_config", "inference_mode", "megatron_core"} | {
        "peft_version",
        "qalora_group_size",
        "revision",
        "task_type",
    }
    read = {"r", "lora_alpha", "lora_dropout", "target_modules", "runtime_config"}
    others = {f.name for f in fields(peft.LoraConfig)} - without_effect - read | {"use_next_years_lora"}
    assert len(others) > 25
    for option in sorted(others):
        path.write_text(json.dumps(plain | {option: {"some": "value"}}))
        with pytest.raises(UserError, match=f": {option} is not supported here; load this adapter with peft"):
            adapter_settings(folder)
    path.write_text(json.dumps(plain | dict.fromkeys(without_effect, "value") | dict.fromkeys(others - plain.keys())))
    assert adapter_settings(folder) == SETTINGS


def _refusal(base, folder, sha256=None):
    with pytest.raises(UserError) as error:
        load_adapter(base.model, folder, sha256)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_an_adapter_of_another_base_is_refused(folder, tiny_base):
    base = tiny_base()
    message = _refusal(base, folder, "f" * 64)
    assert base.sha256[:12] in message and "ffffffffffff" in message and str(folder) in message
    assert not list(lora_layers(base.model))


def _rewrite(folder, change):
    path = folder / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)


@pytest.mark.parametrize(
    "damage, said",
    [
        (lambda f: (f / "adapter_model.safetensors").unlink(), "adapter weights cannot be read"),
        (lambda f: (f / "adapter_model.safetensors").write_bytes(b"x" * 999), "adapter weights cannot be read"),
        (lambda f: (f / "adapter_config.json").unlink(), "No such file"),
        (lambda f: (f / "adapter_config.json").write_text("{"), "not valid JSON"),
        (lambda f: (f / "adapter_config.json").write_text('{"r": 3}'), "not a LoRA adapter's settings"),
        (lambda f: (f / "adapter_config.json").write_text("[]"), "not a LoRA adapter's settings"),
        (lambda f: _rewrite(f, lambda t: {k: v for k, v in t.items() if "layers.1" not in k}), "the file is not whole"),
        (lambda f: _rewrite(f, lambda t: t | {"base_model.model.extra": torch.ones(1)}), "holds 'extra'"),
        (lambda f: _rewrite(f, lambda t: {k: v[..., :2].contiguous() for k, v in t.items()}), r"has shape"),
    ],
)
def test_a_damaged_adapter_is_refused(folder, tiny_base, damage, said):
    damage(folder)
    message = _refusal(tiny_base(), folder)
    assert said in message and str(folder) in message


@pytest.mark.parametrize(
    "option, value", [("use_rslora", True), ("alpha_pattern", {"q_proj": 4}), ("init_lora_weights", "pissa")]
)
def test_an_update_that_works_otherwise_is_refused(folder, tiny_base, option, value):
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {option: value}))
    said = _refusal(tiny_base(), folder)
    assert option in said and "is not supported" in said
