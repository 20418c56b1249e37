"""Causal attention in blocks of queries: no key is copied for the heads that share it, none after the last query is read.

PyTorch's fused attention has a slow backward pass on CPUs. Here a block of queries meets the keys up to its end in whole matrix
products, which is what bfloat16 arithmetic is fast at: once for each query's largest score, once for all scores less that.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from . import Context
from .prefix import LEAN, Prefix

BLOCK = 128  # queries that meet the keys in one product
CAUSAL = "causal"  # name of the attention that `attend_causal` gives, as `transformers` knows it


def _scores(
    query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, peak: torch.Tensor | None = None
) -> torch.Tensor:
    """Of a block of queries (n, group, block, dim) with the keys up to its end (n, stop, dim): (n, group, block, stop).

    `peak` (n, group, block, 1) is taken off, which no softmax notices. Qwen2's key biases make large scores, and
    bfloat16 would round their differences away; the product adds in float32 and rounds what is left.
    """
    n, group, block, dim = query.shape
    rows = query.reshape(n, group * block, dim)
    if peak is None:
        scores = torch.bmm(rows, key.mT)
    else:
        scores = torch.baddbmm(-peak.reshape(n, group * block, 1), rows, key.mT)
    scores = scores.view(n, group, block, -1)
    if mask is None:
        future = torch.ones(block, block, dtype=torch.bool, device=query.device).triu(1)
        scores[..., -block:].masked_fill_(future, -torch.inf)
    else:  # a row that may see nothing, of padding, sees everything alike: no division by zero
        scores.view(len(mask), -1, *scores.shape[1:]).masked_fill_(~mask[:, :, None], torch.finfo(scores.dtype).min)
    return scores


class _BlockwiseAttention(torch.autograd.Function):
    """The backward pass computes the probabilities again, block by block (Dao et al., *FlashAttention*, 2022).

    query : (n, group, length, dim), scaled; key, value : (n, length, dim), for n = batch × key-value heads
    mask : bool (batch, 1, length, length), true where a query may see a key, or None for all keys up to its own.
    """

    @staticmethod
    def forward(
        ctx: Context, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        out, peak = torch.empty_like(query), torch.empty_like(query[..., :1])
        for block, stop, seen in _blocks(query, mask):
            peak[:, :, block] = _scores(query[:, :, block], key[:, :stop], seen).amax(-1, keepdim=True)
            p = _scores(query[:, :, block], key[:, :stop], seen, peak[:, :, block]).softmax(-1)
            out[:, :, block] = torch.bmm(p.flatten(1, 2), value[:, :stop]).view(out[:, :, block].shape)
        ctx.save_for_backward(query, key, value, mask, out, peak)
        return out

    @staticmethod
    def backward(ctx: Context, slope: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, mask, out, peak = ctx.saved_tensors
        grad_query = torch.empty_like(query)
        wide = torch.promote_types(key.dtype, torch.float32)  # the sums over blocks lose nothing
        grad_key, grad_value = (torch.zeros_like(x, dtype=wide) for x in (key, value))
        mean = (slope * out).sum(-1, keepdim=True)  # (n, group, length, 1), the softmax's share of every slope
        for block, stop, seen in _blocks(query, mask):
            # (n, group, block, stop)
            p = _scores(query[:, :, block], key[:, :stop], seen, peak[:, :, block]).softmax(-1)
            slopes = slope[:, :, block].flatten(1, 2)  # (n, group × block, dim)
            grad = torch.bmm(slopes, value[:, :stop].mT).view_as(p).sub_(mean[:, :, block]).mul_(p).flatten(1, 2)
            grad_query[:, :, block] = torch.bmm(grad, key[:, :stop]).view(grad_query[:, :, block].shape)
            grad_key[:, :stop] += torch.bmm(grad.mT, query[:, :, block].flatten(1, 2))
            grad_value[:, :stop] += torch.bmm(p.flatten(1, 2).mT, slopes)
        return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype), None


def _blocks(query: torch.Tensor, mask: torch.Tensor | None) -> Iterator[tuple[slice, int, torch.Tensor | None]]:
    for start in range(0, query.shape[2], BLOCK):
        stop = min(start + BLOCK, query.shape[2])
        yield slice(start, stop), stop, None if mask is None else mask[:, :, start:stop, :stop]


def lean_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    prefix: Prefix | None = None,
    **options: Any,  # of `transformers`, handed on as they come
) -> tuple[torch.Tensor, None]:
    """Causal attention of heads that share keys (Ainslie et al., *GQA*, 2023); where that gains nothing, `transformers`' own.

    Parameters
    ----------
    query : (batch, heads, new tokens, head dimension)
    key, value : (batch, key-value heads, all tokens, head dimension)
    attention_mask : bool (batch, 1, new tokens, all tokens), optional
    prefix : Prefix, optional
        What comes before `key` and `value` in each row, where several rows share it.

    Returns
    -------
    (batch, new tokens, heads, head dimension), and no weights.
    """
    (batch, heads, new, dim), (shared, length) = query.shape, key.shape[1:3]
    if prefix is not None:
        scale, layer = dim**-0.5 if scaling is None else scaling, module.layer_idx
        assert isinstance(layer, int)  # a module's own attributes pass for tensors
        out = prefix.attend(layer, query * scale, key, value, attention_mask)
        return out.to(query.dtype).transpose(1, 2).contiguous(), None
    device = query.device.type
    kind = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else query.dtype
    one_mask = attention_mask is None or attention_mask.shape[1] == 1
    alike = key.shape == value.shape
    if device == "cpu" and kind == torch.bfloat16 and one_mask and alike and not dropout and 1 < new == length:
        scale = dim**-0.5 if scaling is None else scaling
        stacked = (query * scale).to(kind).reshape(batch * shared, heads // shared, new, dim)
        key, value = (x.to(kind).reshape(batch * shared, length, dim) for x in (key, value))
        with torch.autocast(device, enabled=False):
            out = _BlockwiseAttention.apply(stacked, key, value, attention_mask)
    elif attention_mask is None or not one_mask or new == 1 or heads == shared:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **options
        )
    else:  # one product a group, where `transformers` would copy keys and values for every head
        stacked = query.reshape(batch, shared, heads // shared * new, dim)
        mask = attention_mask.repeat(1, 1, heads // shared, 1)  # (batch, 1, heads of a group × new, all)
        out = F.scaled_dot_product_attention(stacked, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling)
    return out.reshape(batch, heads, new, -1).transpose(1, 2).contiguous(), None


AttentionInterface.register(LEAN, lean_attention)
AttentionMaskInterface.register(LEAN, sdpa_mask)


# Of whole windows, without a mask: there is none for this name, and `transformers` under `torch.compile` would otherwise write one
# out, which keeps PyTorch from its fast kernels.
AttentionInterface.register(CAUSAL, sdpa_attention_forward)


def attend_lean(model: PreTrainedModel) -> AbstractContextManager[None]:
    """Let a model attend with `lean_attention`, if it goes by PyTorch's fused attention otherwise."""
    return _attend(model, LEAN)


def attend_causal(model: PreTrainedModel) -> AbstractContextManager[None]:
    """Let a model attend with PyTorch's fused attention and without a mask: to whole windows, padded on the right if at all.

    A model that sees less than all earlier tokens in some layer attends as in `attend_lean`.
    """
    kinds = set(getattr(model.config, "layer_types", None) or ["full_attention"])
    return _attend(model, CAUSAL if kinds == {"full_attention"} and _window(model) is None else LEAN)


def _window(model: PreTrainedModel) -> int | None:
    """Tokens that layers look back on, in architectures that say so for all layers together."""
    config = model.config
    return None if getattr(config, "layer_types", None) else getattr(config, "sliding_window", None)


@contextmanager
def _attend(model: PreTrainedModel, name: str) -> Iterator[None]:
    before = model.config._attn_implementation
    if before == "sdpa":
        model.config._attn_implementation = name
    try:
        yield
    finally:
        model.config._attn_implementation = before
