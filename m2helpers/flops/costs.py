"""What a piece of work costs, in tokens and in FLOPs by both conventions: the unit that is planned, reserved and billed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from .account import CONVENTIONS, Options, forward_account, generation_flops
from .architecture import is_qwen2

if TYPE_CHECKING:
    from .architecture import Config


@dataclass(frozen=True)
class Cost:
    """Tokens run, padding included, and FLOPs. Costs add up, and multiply by a whole number."""

    tokens: int = 0
    flops: int = 0
    """Exact account: what is billed."""
    flops_course: int = 0
    """The course's account, which counts grouped-query attention as full multi-head attention."""

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.tokens + other.tokens, self.flops + other.flops, self.flops_course + other.flops_course)

    def __sub__(self, other: Cost) -> Cost:
        return self + other * -1

    def __mul__(self, times: int) -> Cost:
        return Cost(self.tokens * times, self.flops * times, self.flops_course * times)

    def shared(self, n: int) -> list[Cost]:
        """Split among so many, as evenly as whole numbers allow: the parts add up to it."""

        def part(total: int, i: int) -> int:
            return total // n + (i < total % n)

        return [Cost(part(self.tokens, i), part(self.flops, i), part(self.flops_course, i)) for i in range(n)]


@dataclass(frozen=True)
class Adaptation:
    """What the price of a step depends on beside the base and the batch: what is adapted, and what is scored."""

    lora_r: int = 0
    """Rank of the updates; 0 for none."""
    target_modules: tuple[str, ...] = ("q_proj", "v_proj")
    """Which matrices have one, in every layer."""
    vocabulary: int | None = None
    """Rows of the head that are scored; None for all."""
    gradient_checkpointing: bool = False
    """Whether the layers run forward once more in the backward pass."""
    head_bias: bool = True
    """Whether the LM head has a bias."""

    def options(self, convention: str) -> Options:
        """What the account asks for, by one convention."""
        return Options(
            lora_r=self.lora_r,
            target_modules=self.target_modules,
            head_bias=self.head_bias,
            vocabulary=self.vocabulary,
            convention=convention,
        )


UNADAPTED = Adaptation()


def forward_cost(
    config: Config,
    batch_size: int,
    length: int,
    adapted: Adaptation = UNADAPTED,
    *,
    loss: bool = False,
    scored_positions: int | None = None,
) -> Cost:
    """Cost of one forward pass (`loss` and `scored_positions` as in `forward_account`)."""

    def price(convention: str) -> int:
        how = adapted.options(convention)
        return forward_account(config, batch_size, length, loss=loss, scored_positions=scored_positions, **how).forward

    return Cost(batch_size * length, *_by_convention(config, price))


def training_cost(config: Config, batch_size: int, length: int, adapted: Adaptation = UNADAPTED) -> Cost:
    """Cost of one training step: three forward passes with the loss.

    With activation checkpointing the layers run forward once more.
    """

    def price(convention: str) -> int:
        account = forward_account(config, batch_size, length, loss=True, **adapted.options(convention))
        return account.training + adapted.gradient_checkpointing * account.blocks

    return Cost(batch_size * length, *_by_convention(config, price))


def generation_cost(
    config: Config, batch_size: int, prompt: int, new_tokens: int, adapted: Adaptation = UNADAPTED
) -> Cost:
    """Cost of generating with a KV cache (as in `generation_flops`)."""

    def price(convention: str) -> int:
        return generation_flops(config, batch_size, prompt, new_tokens, **adapted.options(convention))

    return Cost(batch_size * (prompt + new_tokens), *_by_convention(config, price))


def continuation_cost(config: Config, prompt: int, tokens: int, adapted: Adaptation = UNADAPTED) -> Cost:
    """Cost of reading so many tokens of one row, one at a time, after a prompt that a cache holds, and scoring each."""
    first = generation_cost(config, 1, prompt, 1, adapted)  # the prompt, with what it says of the next token
    return generation_cost(config, 1, prompt, tokens + 1, adapted) - first


BatchCost = Callable[[tuple[int, int]], Cost]
"""Shape of a batch, (rows, length) → what it costs."""


def batch_costs(config: Config, adapted: Adaptation) -> tuple[BatchCost, BatchCost]:
    """What a training step of a run and a pass of its validation cost; each shape is worked out once."""

    @cache
    def step_cost(shape: tuple[int, int]) -> Cost:
        return training_cost(config, *shape, adapted)

    @cache
    def pass_cost(shape: tuple[int, int]) -> Cost:
        return forward_cost(config, *shape, adapted, loss=True)

    return step_cost, pass_cost


def _by_convention(config: Config, price: Callable[[str], int]) -> tuple[int, int]:
    """Both conventions; they are one for an architecture that is counted, not derived, and counting takes time."""
    exact, course = CONVENTIONS
    first = price(exact)
    return first, price(course) if is_qwen2(config) else first
