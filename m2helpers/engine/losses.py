"""Cross-entropy of a linear head, without a tensor of every position times the whole vocabulary."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F

from ..files import UserError
from . import Context
from .processes import end

CHUNK = 256  # positions whose logits exist at once: 256 × 151,936 in float32 are 156 MB
CHUNKS = 16  # at most, of a batch in fixed shapes: each is a part of the graph that is compiled
IGNORED = -100  # label of a position that is not scored, PyTorch's own
LOGITS = 2**26  # that may exist at once there, where fewer chunks do


class Diverged(UserError):
    """The loss of a run is no longer a finite number; every further step would be wasted."""


def refuse_nan(losses: Iterable[float], step: int) -> None:
    """Refuse to train on from losses, those of all processes, that are not finite (`Diverged`)."""
    if not all(map(math.isfinite, losses)):
        end(Diverged(f"step {step}: the loss is no longer a number; use a smaller learning_rate"))


def head_loss(
    states: torch.Tensor,
    head: torch.nn.Linear,
    labels: torch.Tensor,
    characters: torch.Tensor | None = None,
    *,
    padded: bool = False,
) -> torch.Tensor:
    """Mean cross-entropy of the next token, in nats.

    Parameters
    ----------
    states : (n, hidden)
        What the last layer gives at the scored positions.
    head : nn.Linear
        The LM head: frozen weight (vocab, hidden), trainable bias (vocab,).
    labels : int64 (n,)
        The tokens that follow.
    characters : int64 (k,), rising, optional
        Score only these tokens, as if no other existed: the softmax over the whole vocabulary, renormalised over them.
    padded : bool
        Labels may be `IGNORED`, and their positions are not scored: no shape depends on how many are, and nothing waits for
        a GPU. It also takes larger chunks.

    Returns
    -------
    scalar tensor
    """
    weight: torch.Tensor = head.weight.detach()
    bias: torch.Tensor = head.bias
    if characters is not None:
        found = torch.searchsorted(characters, labels)
        weight, bias = weight[characters], bias[characters]
        labels = torch.where(labels == IGNORED, IGNORED, found) if padded else found
    return _LinearCrossEntropy.apply(states, weight, bias, labels, torch.is_grad_enabled(), padded)


class _LinearCrossEntropy(torch.autograd.Function):
    """The gradients are computed with the loss, chunk by chunk, so that no chunk's logits are kept or computed twice.

    Source of the idea: Hsu et al., *Liger Kernel: Efficient Triton Kernels for LLM Training*, 2024.
    """

    @staticmethod
    def forward(
        ctx: Context,
        states: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        labels: torch.Tensor,
        learn: bool,
        padded: bool,
    ) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float32, device=states.device)
        grad_states, grad_bias = torch.empty_like(states), torch.zeros_like(bias, dtype=torch.float32)
        size = max(CHUNK, -(-len(labels) // CHUNKS), LOGITS // len(weight)) if padded else CHUNK
        for first in range(0, len(labels), size):
            rows = slice(first, first + size)
            logits = F.linear(states[rows], weight).float() + bias  # (chunk, vocab)
            total += F.cross_entropy(logits, labels[rows], ignore_index=IGNORED, reduction="sum")
            if learn:
                slope = logits.softmax(-1)  # of the sum of losses, by each logit
                if padded:  # in a form that a compiler makes one kernel of
                    right = labels[rows, None] == torch.arange(len(weight), device=labels.device)
                    slope = (slope - right.float()) * (labels[rows, None] != IGNORED)
                else:
                    slope[torch.arange(len(slope), device=slope.device), labels[rows]] -= 1
                grad_bias += slope.sum(0)
                grad_states[rows] = (slope.to(weight.dtype) @ weight).to(states.dtype)
        count = (labels != IGNORED).sum() if padded else len(labels)
        ctx.save_for_backward(grad_states / count, (grad_bias / count).to(bias.dtype))
        return total / count

    @staticmethod
    def backward(ctx: Context, slope: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_states, grad_bias = ctx.saved_tensors
        return slope * grad_states, None, slope * grad_bias, None, None, None
