"""Norms and feed-forward layers that keep less: the same output, the same gradients, less kept."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from m2helpers.engine.activations import lean_activations
from m2helpers.lora import apply_lora, trainable_parameters
from m2helpers.models import add_head_bias, embedded_config
from m2helpers.settings import LoraSettings

SIZES = dict(vocab_size=300, hidden_size=32, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4)
MODELS = {
    "Qwen2": lambda: Qwen2ForCausalLM(embedded_config(**SIZES, initializer_range=0.3)),
    "Qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=8, initializer_range=0.3)),
    "Llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2, initializer_range=0.3)),
}
IDS = torch.randint(0, 64, (3, 20), generator=torch.Generator().manual_seed(0))


def _adapted(name, dtype):
    torch.manual_seed(0)
    model = add_head_bias(MODELS[name]().to(dtype))
    with torch.no_grad():
        for key, p in model.named_parameters():
            if "norm" in key:
                p.uniform_(0.5, 1.5)
    apply_lora(model, LoraSettings(lora_r=2, lora_dropout=0, target_modules=("q_proj", "v_proj", "down_proj")))
    with torch.no_grad():
        for key, p in trainable_parameters(model).items():
            if "lora_B" in key:
                p.normal_(0, 0.1)
    return model.train()


def _loss_and_gradients(model):
    model.zero_grad()
    kept = {}

    def keep(tensor):
        if not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(input_ids=IDS, labels=IDS).loss
    held = sum(kept.values())
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in trainable_parameters(model).items()}, held


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_output_and_gradients_are_the_same_and_less_is_kept(name, dtype):
    model = _adapted(name, dtype)
    loss, gradients, held = _loss_and_gradients(model)
    with lean_activations(model):
        changed = [m for m in model.modules() if "forward" in vars(m)]
        assert len(changed) >= 2 * 3 + 1  # two norms and a feed-forward layer a block, and the last norm
        lean_loss, lean_gradients, lean_held = _loss_and_gradients(model)
    assert torch.equal(lean_loss, loss)
    tolerance = dict(rtol=1e-4, atol=1e-6) if dtype == torch.float32 else dict(rtol=0.05, atol=2e-3)
    for key, gradient in gradients.items():
        torch.testing.assert_close(lean_gradients[key], gradient, **tolerance)
    assert lean_held < 0.9 * held
    assert not any("forward" in vars(m) for m in model.modules())


def test_norms_that_learn_are_left_alone():
    model = _adapted("Qwen2", torch.float32)
    for p in model.parameters():
        p.requires_grad_(True)
    with lean_activations(model):
        model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "norm" in n)
