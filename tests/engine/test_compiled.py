"""Training steps in fixed shapes: the same losses and gradients as of the batch as it is, uncompiled and compiled."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters
from transformers import LlamaConfig, LlamaForCausalLM

from m2helpers.engine import losses
from m2helpers.engine.attention import attend_causal
from m2helpers.engine.compiled import BUCKETS, FixedPasses, bucket, fixed_batch
from m2helpers.engine.losses import IGNORED
from m2helpers.lora import CheapDropout, apply_lora, lora_layers, trainable_parameters
from m2helpers.models import add_head_bias
from m2helpers.settings import LoraSettings
from m2helpers.training.steps import _loss

NUMERIC = torch.arange(10, 27)


@pytest.fixture
def adapted(tiny_base):
    """Makes a base with updates that do something, and no dropout unless asked for."""

    def make(layers=2, dropout=0.0):
        base = tiny_base()
        base.model.model.layers, base.model.config.num_hidden_layers = base.model.model.layers[:layers], layers
        torch.manual_seed(0)
        for _, layer in lora_layers(apply_lora(base.model, LoraSettings(lora_r=2, lora_dropout=dropout))):
            torch.nn.init.normal_(layer.lora_B.weight, std=0.1)
        return base

    return make


def _windows(*lengths):
    return [np.random.default_rng(n).integers(10, 27, n) for n in lengths]


def _passes(base, characters=None, longest=48, compiled=False):
    return FixedPasses(base.model.train(), base.pad_id, longest, characters, nullcontext, compiled=compiled)


def _gradients(base):
    parameters = trainable_parameters(base.model)
    found = {name: p.grad.clone() for name, p in parameters.items()}
    for p in parameters.values():
        p.grad = None
    return found


def _as_it_is(base, windows, characters):
    """The loss and the gradients of the batch in its own shape, by the CPU's way."""
    loss, _ = _loss(base, windows, characters)
    loss.backward()
    return loss.item(), _gradients(base)


def _assert_alike(loss, gradients, expected_loss, expected):
    assert loss.item() == pytest.approx(expected_loss, rel=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            gradient, expected[name], rtol=1e-4, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}"
        )


def test_lengths_fall_into_a_few_buckets():
    sizes = [bucket(length, 510) for length in range(1, 511)]
    assert all(size >= length for length, size in enumerate(sizes, 1)) and sizes == sorted(sizes)
    assert len(set(sizes)) == BUCKETS and sizes[-1] == 510


def test_a_batch_scores_what_follows_and_nothing_else():
    ids, labels = fixed_batch([np.array([11, 12, 13]), np.array([14, 15])], 0, 20)
    assert ids.tolist() == [[11, 12, 13, 0, 0], [14, 15, 0, 0, 0]]
    assert labels.tolist() == [[12, 13] + 3 * [IGNORED], [15] + 4 * [IGNORED]]


@pytest.mark.parametrize("characters", [None, NUMERIC])
@pytest.mark.parametrize("lengths", [(40, 33, 7), (48, 48)])
def test_fixed_shapes_change_neither_loss_nor_gradients(adapted, characters, lengths, monkeypatch):
    for name, value in dict(CHUNK=8, CHUNKS=10, LOGITS=260).items():  # several chunks, the last of them not full
        monkeypatch.setattr(losses, name, value)
    base, windows = adapted(), _windows(*lengths)
    expected = _as_it_is(base, windows, characters)
    loss = _passes(base, characters).backward(windows)
    _assert_alike(loss, _gradients(base), *expected)


@pytest.mark.slow
@pytest.mark.parametrize(("characters", "batches"), [(None, [(8, 5)]), (NUMERIC, [(16, 9), (8, 5), (7, 6)])])
def test_compiled_passes_give_the_same(adapted, characters, batches):
    """By inductor on the CPU, in one graph a length; a length that came before is not compiled again."""
    base = adapted(layers=1)
    passes, shapes = _passes(base, characters, longest=16, compiled=True), set()
    counters.clear()
    for lengths in batches:
        windows, before = _windows(*lengths), passes.seconds
        loss = passes.backward(windows)
        _assert_alike(loss, _gradients(base), *_as_it_is(base, windows, characters))
        shape = bucket(max(lengths), 16)
        assert (passes.seconds > before) == (shape not in shapes)
        shapes.add(shape)
    assert passes.compiled and counters["stats"]["unique_graphs"] == len(shapes) and not counters["graph_break"]


@pytest.mark.slow
def test_dropout_follows_from_the_seed_when_compiled(adapted, monkeypatch):
    monkeypatch.setattr(CheapDropout, "forward", torch.nn.Dropout.forward)  # as on a GPU
    passes, found = _passes(adapted(layers=1, dropout=0.5), NUMERIC, longest=8, compiled=True), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(passes.backward(_windows(8, 8)).item())
    assert found[0] == found[1] != found[2]


def test_what_cannot_be_compiled_runs_as_it_is(adapted, monkeypatch):
    def refuse(*_, **__):
        raise torch._dynamo.exc.TorchDynamoException("no compiler\nand a long story")

    monkeypatch.setattr(torch, "compile", lambda *_, **__: refuse)
    base, windows = adapted(), _windows(40, 33)
    expected = _as_it_is(base, windows, None)
    passes = _passes(base, compiled=True)
    with pytest.warns(UserWarning, match=r"cannot be compiled \(no compiler\) and runs as it is$"):
        loss = passes.backward(windows)
    _assert_alike(loss, _gradients(base), *expected)
    assert not passes.compiled


def test_no_mask_is_written_out_where_all_earlier_tokens_are_seen(tiny_base):
    """Not for the shape of it either, under a tracer; a window that layers look back on keeps its mask."""
    small = dict(vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    llama = add_head_bias(LlamaForCausalLM(LlamaConfig(**small)))
    for model in (tiny_base().model, llama):
        with attend_causal(model):
            assert model.config._attn_implementation == "causal"
            (hidden,) = model.base_model(NUMERIC[None], use_cache=False, return_dict=False)[:1]
        torch.testing.assert_close(hidden, model.base_model(NUMERIC[None]).last_hidden_state)
        assert model.config._attn_implementation == "sdpa"
        model.config.layer_types = ["sliding_attention"]
        with attend_causal(model):
            assert model.config._attn_implementation == "lean"
