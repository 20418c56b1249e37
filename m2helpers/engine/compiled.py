"""The two passes of a training step as a GPU likes them: in a few shapes, compiled once for each, and nothing waits for the host.

A step of a small model on a GPU is mostly the launching of its kernels. Here windows are padded to one of a few lengths, each
length is compiled by `torch.compile` into fused kernels that CUDA graphs launch at one stroke, and the loss stays on the GPU until
somebody wants to read it. A CPU gains nothing from any of it (`docs/experiment_log.md`) and keeps its own way.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import numpy as np
import torch
from torch._dynamo.exc import TorchDynamoException
from transformers import PreTrainedModel

from ..text import right_pad
from .activations import lean_activations
from .attention import attend_causal
from .losses import IGNORED, head_loss

BUCKETS = 4  # lengths at most: each takes the better part of a minute to compile


def bucket(length: int, longest: int) -> int:
    """The least of `BUCKETS` evenly spaced lengths, the last of them `longest`, that holds `length` tokens."""
    spacing = -(-longest // BUCKETS)
    return min(-(-length // spacing) * spacing, longest)


def fixed_batch(windows: Sequence[np.ndarray], pad_id: int, longest: int) -> np.ndarray:
    """Token ids of windows and the labels that follow them, padded to one of a few lengths: int64 (2, batch, length).

    The label of what is not scored is `losses.IGNORED`: that of padding, and that of a window's last token.
    """
    ids, mask = right_pad(windows, pad_id)  # (batch, longest of the batch)
    batch = np.full((2, len(ids), bucket(ids.shape[1], longest)), pad_id)
    batch[1] = IGNORED
    batch[0, :, : ids.shape[1]] = ids
    batch[1, :, : ids.shape[1] - 1] = np.where(mask[:, 1:] == 1, ids[:, 1:], IGNORED)
    return batch


class FixedPasses:
    """Forward and backward passes of training steps in a few shapes.

    Parameters
    ----------
    model : PreTrainedModel
        With a head bias; trained are its parameters that want gradients.
    pad_id : int
        The token that fills a batch.
    longest : int
        Of all windows, in tokens.
    characters : int64 (k,), rising, optional
        Score only these tokens (`losses.head_loss`).
    precision : callable
        Gives the context that a forward pass runs in.
    compiled : bool
        Compile them, with CUDA graphs on a GPU. Where that fails, a warning says why, and they run as they are.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        pad_id: int,
        longest: int,
        characters: torch.Tensor | None,
        precision: Callable[[], AbstractContextManager],
        *,
        compiled: bool,
    ) -> None:
        self.model, self.pad_id, self.longest, self.characters = model, pad_id, longest, characters
        self.precision, self.compiled = precision, compiled
        self.seconds = 0.0
        """Spent on compiling so far: the first step of each shape, which is hardly anything else."""
        self._seen: set[int] = set()
        if compiled:
            torch._dynamo.reset()  # what an earlier run compiled would count against this one, and keep its weights
            self._run = torch.compile(self._loss, mode="reduce-overhead", dynamic=False)

    def backward(self, windows: Sequence[np.ndarray]) -> torch.Tensor:
        """Add the gradients of the mean loss per token of windows to the parameters'; return the loss, still on the device."""
        device = self.model.device
        batch = torch.from_numpy(fixed_batch(windows, self.pad_id, self.longest))
        if torch.cuda.is_available():
            batch = batch.pin_memory()  # or the copy would wait
        ids, labels = batch.to(device, non_blocking=True)
        length = ids.shape[1]
        if self.compiled:
            try:
                return self._compiled(ids, labels, first=length not in self._seen)
            except TorchDynamoException as error:  # of the forward or the backward pass: no gradient was added
                reason = str(error).strip().splitlines()[0]
                warnings.warn(f"the training step cannot be compiled ({reason}) and runs as it is", stacklevel=2)
                self.compiled = False
        with lean_activations(self.model):
            return _backward(self._forward(ids, labels))

    def _compiled(self, ids: torch.Tensor, labels: torch.Tensor, *, first: bool) -> torch.Tensor:
        started = time.perf_counter()
        torch.compiler.cudagraph_mark_step_begin()
        with attend_causal(self.model), self.precision():
            loss = self._run(ids, labels)
        loss = _backward(loss).clone()  # the graph's own is overwritten by the next step
        if first:
            self._seen.add(ids.shape[1])
            self.seconds += time.perf_counter() - started
        return loss

    def _forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        with attend_causal(self.model), self.precision():
            return self._loss(ids, labels)

    def _loss(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy over the scored positions of a batch, (batch, length) each.

        Padding comes after all that is scored, and a causal model never looks ahead: it needs no mask.
        """
        hidden = self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state  # (batch, length, hidden)
        head = self.model.get_output_embeddings()
        return head_loss(hidden.flatten(0, 1), head, labels.flatten(), self.characters, padded=True)


def _backward(loss: torch.Tensor) -> torch.Tensor:
    loss.backward()
    return loss.detach()
