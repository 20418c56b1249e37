"""The cache of decoding, against what `transformers` does."""

import torch
from transformers import DynamicCache, MistralConfig, MistralForCausalLM

from m2helpers.engine import kvcache
from m2helpers.engine.kvcache import joined, make_cache, rows_at_once


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
