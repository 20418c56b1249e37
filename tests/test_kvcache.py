"""The cache and the grouped attention of decoding, against what `transformers` does."""

import numpy as np
import pytest
import torch
from transformers import DynamicCache, MistralConfig, MistralForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from m2helpers import kvcache
from m2helpers.kvcache import GROUPED, grouped, grouped_attention, joined, make_cache, rows_at_once


def _read(model, cache, ids):
    return model(input_ids=ids, past_key_values=cache).logits


@torch.no_grad()
def test_it_gives_what_the_cache_of_transformers_gives(tiny_base, monkeypatch):
    """Over its room's end, one and two tokens at a time, and with rows that leave."""
    monkeypatch.setattr(kvcache, "SPARE", 3)
    model = tiny_base().model
    ids = torch.randint(11, 27, (4, 24), generator=torch.Generator().manual_seed(0))
    ours, theirs = make_cache(model.config), DynamicCache(config=model.config)
    rows, place = torch.arange(4), 0
    for new in (7, 1, 2, 1, 1, 2, 1, 5, 1, 3):
        part = ids[rows, place : place + new]
        torch.testing.assert_close(_read(model, ours, part), _read(model, theirs, part))
        place += new
        assert ours.get_seq_length() == theirs.get_seq_length() == place
        if new == 5:
            for cache in (ours, theirs):
                cache.batch_select_indices(torch.tensor([0, 2, 3]))
            rows = rows[[0, 2, 3]]
    assert place == 24


@torch.no_grad()
def test_rows_read_apart_are_as_read_together(tiny_base):
    model = tiny_base().model
    ids = torch.randint(11, 27, (5, 9), generator=torch.Generator().manual_seed(1))
    together, parts = make_cache(model.config), [make_cache(model.config) for _ in range(3)]
    _read(model, together, ids[:, :8])
    for cache, rows in zip(parts, ids[:, :8].split(2), strict=True):
        _read(model, cache, rows)
    cache = joined(parts)
    torch.testing.assert_close(_read(model, cache, ids[:, 8:]), _read(model, together, ids[:, 8:]))


def test_prompts_are_read_a_few_at_a_time_where_the_cache_allows_it(tiny_base):
    assert rows_at_once(tiny_base().model.config, 512) == 8
    assert rows_at_once(tiny_base().model.config, 10**6) == 1
    sliding = MistralConfig(hidden_size=32, num_hidden_layers=1, sliding_window=4)
    assert rows_at_once(sliding, 512) > 10**6
    assert type(make_cache(sliding).layers[0]) is type(DynamicCache(config=sliding).layers[0])


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("new", [1, 2, 5])
def test_grouped_attention_is_that_of_transformers(new, masked):
    draw = torch.Generator().manual_seed(2)
    query, key, value = (torch.randn(3, heads, n, 8, generator=draw) for heads, n in ((6, new), (2, 11), (2, 11)))
    mask = (torch.rand(3, 1, new, 11, generator=draw) < 0.7) if masked else None
    if masked:
        mask[..., 0] = True
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = 3, True
    expected, _ = sdpa_attention_forward(module, query, key, value, mask, scaling=0.3)
    found, _ = grouped_attention(module, query, key, value, mask, scaling=0.3)
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
        kvcache.F, "scaled_dot_product_attention", lambda q, *a, **k: calls.append(q.shape) or wanted(q, *a, **k)
    )
    with pytest.raises(KeyError), grouped(model):
        assert model.config._attn_implementation == GROUPED
        torch.testing.assert_close(model(ids, attention_mask=mask).logits[:, -1], expected)
        raise KeyError
    assert calls[0] == (2, 2, 12, 8)  # two key-value heads, each with two heads' queries of six tokens
    assert model.config._attn_implementation == "sdpa"
    model.set_attn_implementation("eager")  # what counts FLOPs
    with grouped(model):
        assert model.config._attn_implementation == "eager"


@torch.no_grad()
def test_a_sliding_window_decodes_as_it_reads(tiny_base):
    """Two passes with our cache give what one without a cache gives."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4)
    model = MistralForCausalLM(MistralConfig(**sizes, num_key_value_heads=2, sliding_window=4)).eval()
    ids = torch.randint(0, 64, (2, 9))
    cache = make_cache(model.config)
    _read(model, cache, ids[:, :8])
    torch.testing.assert_close(_read(model, cache, ids[:, 8:])[:, -1], model(ids).logits[:, -1])
