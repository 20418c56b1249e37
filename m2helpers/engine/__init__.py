"""What the notebooks never open: attention, activations, losses, the cache, saving, tracking and the training loop."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch


class Context(Protocol):
    """What the two passes of a `torch.autograd.Function` share; PyTorch's own stub knows of one saved tensor only."""

    saved_tensors: tuple[torch.Tensor, ...]

    def save_for_backward(self, *tensors: torch.Tensor | None) -> None:
        """Keep tensors of the forward pass for the backward pass."""
