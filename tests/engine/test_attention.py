"""Attention in blocks and by groups, against what `transformers` and PyTorch do."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from m2helpers.engine import attention
from m2helpers.engine.attention import LEAN, attend_lean, lean_attention


def _module(groups):
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = groups, True
    return module


def _padded(batch, length):
    """The mask of left-padded rows, the last of them whole: bool (batch, 1, length, length)."""
    real = torch.arange(length) >= torch.arange(batch - 1, -1, -1)[:, None] * 2  # (batch, length)
    return torch.ones(length, length, dtype=torch.bool).tril() & real[:, None, None, :]


@pytest.mark.parametrize("length", [1, 4, 10])
@pytest.mark.parametrize("masked", [True, False])
def test_blocks_and_their_gradients_are_those_of_pytorch(masked, length, monkeypatch):
    """Blocks of four, a last one that is not whole, three heads to a group, in double precision."""
    monkeypatch.setattr(attention, "BLOCK", 4)
    draw = torch.Generator().manual_seed(0)
    sizes = [(2, 6, length, 5), (2, 2, length, 5), (2, 2, length, 5)]  # (batch, heads, length, dim)
    query, key, value = tensors = [
        torch.randn(size, generator=draw, dtype=torch.double, requires_grad=True) for size in sizes
    ]
    mask = _padded(2, length) if masked else None
    real = torch.ones(2, length, 1) if mask is None else mask.any(-1).transpose(1, 2)  # rows that see something
    slope = torch.randn(sizes[0], generator=draw, dtype=torch.double) * real[:, None]
    stacked = [query.reshape(4, 3, length, 5), *(x.reshape(4, length, 5) for x in (key, value))]
    found = attention._BlockwiseAttention.apply(*stacked, mask).reshape(sizes[0])
    expected = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, scale=1.0, enable_gqa=True
    )
    assert found.isfinite().all()
    torch.testing.assert_close(found * real[:, None], expected.nan_to_num() * real[:, None])
    for ours, theirs in zip(*(torch.autograd.grad(x, tensors, slope) for x in (found, expected)), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("masked", [True, False])
def test_attention_in_bfloat16_is_that_of_transformers(masked):
    draw = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(3, heads, 300, 16, generator=draw) for heads in (6, 2, 2))
    mask = _padded(3, 300) if masked else None
    expected, _ = sdpa_attention_forward(_module(3), query, key, value, mask, scaling=0.3)
    for cast in (lambda x: x, lambda x: x.bfloat16()):  # under autocast queries come in float32
        with torch.autocast("cpu", torch.bfloat16):
            found, _ = lean_attention(_module(3), *map(cast, (query, key, value)), mask, scaling=0.3)
        assert found.dtype == torch.bfloat16 and found.shape == (3, 300, 6, 16)
        seen = slice(4, None)  # past the padding of every row
        torch.testing.assert_close(found[:, seen].float(), expected[:, seen], atol=0.04, rtol=0.02)


@pytest.mark.parametrize("masked", [True, False])
def test_large_key_biases_cost_no_precision(masked):
    """Qwen2's do: scores far from nought, all of them, whose differences bfloat16 cannot hold."""
    draw = torch.Generator().manual_seed(5)
    query, key, value = (torch.randn(3, heads, 200, 16, generator=draw) for heads in (6, 2, 2))
    query[..., 0], key[..., 0] = 30, 30  # scores of 900 · 0.25 and more
    query, key, value = (x.bfloat16() for x in (query, key, value))
    mask = _padded(3, 200) if masked else None
    leaves = [x.requires_grad_() for x in (query, key, value)]
    wide = [x.detach().double().requires_grad_() for x in leaves]
    theirs, _ = sdpa_attention_forward(_module(3), *wide, mask, scaling=0.25)
    found, _ = lean_attention(_module(3), *leaves, mask, scaling=0.25)
    torch.testing.assert_close(found[:, 4:].double(), theirs[:, 4:], atol=0.03, rtol=0.02)
    slope = torch.randn(found[:, 4:].shape, generator=draw, dtype=torch.double)
    found = torch.autograd.grad(found[:, 4:], leaves, slope.bfloat16())
    expected = torch.autograd.grad(theirs[:, 4:], wide, slope)
    # Of keys and values; a query's is a sum that cancels, of slopes times keys of 30, and noise in any bfloat16.
    for ours, true in zip(found[1:], expected[1:], strict=True):
        assert (ours.double() - true).norm() < 0.03 * true.norm()


@pytest.mark.parametrize("masked", [True, False])
def test_values_of_another_size_go_by_pytorch(masked):
    query, key, value = torch.ones(1, 4, 6, 8), torch.ones(1, 2, 6, 8), torch.ones(1, 2, 6, 3)
    mask = _padded(1, 6) if masked else None
    found, _ = lean_attention(_module(2), *(x.bfloat16() for x in (query, key, value)), mask, scaling=0.3)
    assert found.shape == (1, 6, 4, 3)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("new", [1, 2, 5])
def test_attention_in_float32_is_that_of_transformers(new, masked):
    draw = torch.Generator().manual_seed(2)
    query, key, value = (torch.randn(3, heads, n, 8, generator=draw) for heads, n in ((6, new), (2, 11), (2, 11)))
    mask = (torch.rand(3, 1, new, 11, generator=draw) < 0.7) if masked else None
    if masked:
        mask[..., 0] = True
    module = _module(3)
    expected, _ = sdpa_attention_forward(module, query, key, value, mask, scaling=0.3)
    found, _ = lean_attention(module, query, key, value, mask, scaling=0.3)
    torch.testing.assert_close(found, expected)
    assert found.shape == (3, new, 6, 8)


@torch.no_grad()
def test_a_model_attends_by_groups_inside_and_as_before_outside(tiny_base, monkeypatch):
    model = tiny_base().model
    ids = torch.randint(11, 27, (2, 6), generator=torch.Generator().manual_seed(3))
    mask = torch.from_numpy(np.array([[0, 0, 1, 1, 1, 1], [1] * 6]))
    expected = model(ids, attention_mask=mask).logits[:, -1]
    calls, wanted = [], torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        attention.F, "scaled_dot_product_attention", lambda q, *a, **k: calls.append(q.shape) or wanted(q, *a, **k)
    )
    with pytest.raises(KeyError), attend_lean(model):
        assert model.config._attn_implementation == LEAN
        torch.testing.assert_close(model(ids, attention_mask=mask).logits[:, -1], expected)
        raise KeyError
    assert calls[0] == (2, 2, 12, 8)  # two key-value heads, each with two heads' queries of six tokens
    assert model.config._attn_implementation == "sdpa"
    model.set_attn_implementation("eager")  # what counts FLOPs
    with attend_lean(model):
        assert model.config._attn_implementation == "eager"


def test_a_bfloat16_model_trains_and_reads_prompts_by_blocks(tiny_base, monkeypatch):
    monkeypatch.setattr(attention, "BLOCK", 4)
    blocks, wanted = [], attention._scores
    monkeypatch.setattr(attention, "_scores", lambda q, *a: blocks.append(q.shape) or wanted(q, *a))
    model = tiny_base().model.bfloat16().train()
    ids = torch.randint(11, 27, (2, 6), generator=torch.Generator().manual_seed(4))
    expected = model(ids, labels=ids).loss
    assert not blocks
    with attend_lean(model):
        loss = model(ids, labels=ids).loss
        forward = len(blocks)
        assert forward == 4 * len(model.model.layers) and blocks[:4:2] == [(4, 2, 4, 8), (4, 2, 2, 8)]
        loss.backward()
    assert len(blocks) == 1.5 * forward  # scores are computed twice forwards, once more backwards, and not kept
    torch.testing.assert_close(loss, expected, atol=0.02, rtol=0.01)
    assert all(p.grad is not None and p.grad.isfinite().all() for n, p in model.named_parameters() if "proj" in n)
