"""Rows that go on from shared prompts, against whole forward passes."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from m2helpers.engine.attention import attend_lean
from m2helpers.engine.kvcache import make_cache
from m2helpers.engine.prefix import Prefix, can_share

SIZES = dict(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4)


def _llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2, initializer_range=0.3)).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("which", ["qwen2", "llama"])
@torch.inference_mode()
def test_rows_read_what_they_would_alone(which, dtype, tiny_base):
    """Two prompts of unlike length, rows that leave, come again and change places, passes of one and two tokens with padding."""
    model = (tiny_base().model if which == "qwen2" else _llama()).to(dtype)
    draw = torch.Generator().manual_seed(0)
    prompts = [torch.randint(11, 27, (n,), generator=draw).tolist() for n in (9, 6)]
    mask = torch.tensor([[1] * 9, [0] * 3 + [1] * 6])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    rows = [prompts[i] for i in (1, 0, 0, 1, 0)]
    with attend_lean(model):
        cache = make_cache(model.config)
        padded = torch.tensor([prompts[0], [0] * 3 + prompts[1]])
        model(input_ids=padded, attention_mask=mask, position_ids=positions, past_key_values=cache)
        assert can_share(model, cache)
        prefix = Prefix.of(cache, mask, torch.tensor([1, 0, 0, 1, 0]))
        own, own_mask, last = (
            make_cache(model.config, torch.float32),
            torch.ones(5, 0, dtype=torch.long),
            positions[:, -1:],
        )
        last = last[torch.tensor([1, 0, 0, 1, 0])]
        for new, kept in ((2, None), (1, [0, 1, 1, 1, 4, 2]), (2, [5, 0, 3]), (1, None)):
            if kept:
                at = torch.tensor(kept)
                prefix, own_mask, last = prefix.rows(at), own_mask[at], last[at]
                own.batch_select_indices(at)
                rows = [rows[i] for i in kept]
            ids = torch.randint(11, 27, (len(rows), new), generator=draw)
            new_mask = torch.ones_like(ids)
            if new == 2:
                new_mask[0, 0] = 0  # padding on the left
            rows = [row + part[seen.bool()].tolist() for row, part, seen in zip(rows, ids, new_mask, strict=True)]
            own_mask = torch.cat([own_mask, new_mask], dim=1)
            at = last + new_mask.cumsum(1)
            last = at[:, -1:]
            out = model(
                input_ids=ids, attention_mask=own_mask, position_ids=at, past_key_values=own, prefix=prefix
            ).logits[:, -1]
            whole = torch.stack([model(torch.tensor([row])).logits[0, -1] for row in rows])
            if dtype == torch.float32:
                torch.testing.assert_close(out, whole, rtol=1e-4, atol=1e-4)
            else:  # as near as one precision is to itself in another order
                assert (out - whole).abs().max() < 0.05 * whole.abs().max()


def test_only_architectures_that_hand_it_on_share(tiny_base):
    model = tiny_base().model
    with attend_lean(model):
        assert can_share(model, make_cache(model.config))
    assert not can_share(model, make_cache(model.config))  # another attention would not know of the prefix
    other = MistralForCausalLM(MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=4))
    with attend_lean(other):
        assert not can_share(other, make_cache(other.config))
