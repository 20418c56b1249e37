"""Activations of frozen layers, kept for the backward pass only where their gradients need them.

`transformers` norms and feed-forward layers leave float32 copies and products behind that cost more memory than the
weights. Here each keeps what it read, in the precision it was read, and computes the rest again. What they return is the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import SiLUActivation

from . import Context

# Classes whose forward passes are these, by name.
NORMS = ("LlamaRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm")
FEED_FORWARDS = ("LlamaMLP", "Qwen2MLP", "Qwen3MLP")


class _RMSNorm(torch.autograd.Function):
    """``weight · x / √(mean x² + eps)`` over the last dimension (Zhang and Sennrich, 2019), with a frozen weight."""

    @staticmethod
    def forward(ctx: Context, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        wide = x.float()
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, scale)
        return weight * (wide * scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Context, slope: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        normal, slope = x.float() * scale, (slope * weight).float()
        slope = scale * (slope - normal * (slope * normal).mean(-1, keepdim=True))
        return slope.to(x.dtype), None, None


class _SwiGLU(torch.autograd.Function):
    """``silu(gate) · up`` (Shazeer, 2020)."""

    @staticmethod
    def forward(ctx: Context, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx: Context, slope: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(slope * up, gate), slope * F.silu(gate)


def _norm(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return _RMSNorm.apply(x, module.weight, module.variance_epsilon)


def _feed_forward(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    gate, up, down = (module.get_submodule(name) for name in ("gate_proj", "up_proj", "down_proj"))
    return down(_SwiGLU.apply(gate(x), up(x)))


@contextmanager
def lean_activations(model: nn.Module) -> Iterator[None]:
    """Let a model with frozen norms keep less; the backward pass belongs inside as well."""
    changed = []
    for module in model.modules():
        name = type(module).__name__
        if name in NORMS and not module.weight.requires_grad:
            module.forward = partial(_norm, module)
        elif name in FEED_FORWARDS and isinstance(module.act_fn, SiLUActivation):
            module.forward = partial(_feed_forward, module)
        else:
            continue
        changed.append(module)
    try:
        yield
    finally:
        for module in changed:
            del module.forward
