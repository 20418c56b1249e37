"""What instruction tuning costs: the account of its passes, and putting four-bit matrices back together for each of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..flops.costs import Adaptation, Cost, batch_costs, generation_cost

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


class Prices:
    """Prices of one run's batches.

    Parameters
    ----------
    config : PreTrainedConfig
    adaptation : Adaptation
    four_bit_weights : int
        Weights that every pass has to put together again, each a multiplication by its block's scale; the look-up is free.
        A training step is three forward passes in this too, and four with gradient checkpointing.
    """

    def __init__(self, config: PreTrainedConfig, adaptation: Adaptation, four_bit_weights: int) -> None:
        self.config, self.adaptation = config, adaptation
        self._step, self._forward = batch_costs(config, adaptation)
        self._unpacking = Cost(0, four_bit_weights, four_bit_weights)

    def step(self, shape: tuple[int, int]) -> Cost:
        """Of training on a batch (rows, length)."""
        return self._step(shape) + self._unpacking * (3 + self.adaptation.gradient_checkpointing)

    def forward(self, shape: tuple[int, int]) -> Cost:
        """Of a batch's loss."""
        return self._forward(shape) + self._unpacking

    def generation(self, rows: int, prompt: int, new_tokens: int) -> Cost:
        """Of answering a batch with a cache."""
        return generation_cost(self.config, rows, prompt, new_tokens, self.adaptation) + self._unpacking * new_tokens

    def epoch(
        self, train: Sequence[int], validation: Sequence[int], batch_sizes: tuple[int, int], processes: int = 1
    ) -> dict[str, Cost]:
        """The most that an epoch over rows of these lengths can cost, by kind: every batch full, and as long as the longest.

        Every one of several processes has as many batches as the others: rows are read again where the last would lack some.
        """
        most = {}
        kinds = (("train", train, self.step), ("validate", validation, self.forward))
        for (kind, lengths, price), size in zip(kinds, batch_sizes, strict=True):
            batches = math.ceil(len(lengths) / (size * processes)) * processes
            most[kind] = price((size, max(lengths))) * batches
        return most
