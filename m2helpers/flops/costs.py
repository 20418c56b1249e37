"""What a piece of work costs, in tokens and in FLOPs by both conventions: the unit that is planned, reserved and billed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache

from .account import CONVENTIONS, forward_account, generation_flops
from .architecture import is_qwen2


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

    def __mul__(self, times: int) -> Cost:
        return Cost(self.tokens * times, self.flops * times, self.flops_course * times)


def forward_cost(config: object, batch_size: int, length: int, **settings: object) -> Cost:
    """Cost of one forward pass (settings as in `forward_account`)."""
    price = lambda c: forward_account(config, batch_size, length, convention=c, **settings).forward  # noqa: E731
    return Cost(batch_size * length, *_by_convention(config, price))


def training_cost(
    config: object, batch_size: int, length: int, *, gradient_checkpointing: bool = False, **settings: object
) -> Cost:
    """Cost of one training step (settings as in `forward_account`): three forward passes with the loss.

    With activation checkpointing the layers run forward once more.
    """

    def price(convention: str) -> int:
        account = forward_account(config, batch_size, length, loss=True, convention=convention, **settings)
        return account.training + gradient_checkpointing * account.blocks

    return Cost(batch_size * length, *_by_convention(config, price))


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


BatchCost = Callable[[tuple[int, int]], Cost]
"""Shape of a batch, (rows, length) → what it costs."""


def batch_costs(config: object, adaptation: Adaptation) -> tuple[BatchCost, BatchCost]:
    """What a training step of a run and a pass of its validation cost; each shape is worked out once."""
    how = asdict(adaptation)
    validation = {key: value for key, value in how.items() if key != "gradient_checkpointing"}

    @cache
    def step_cost(shape: tuple[int, int]) -> Cost:
        return training_cost(config, *shape, **how)

    @cache
    def pass_cost(shape: tuple[int, int]) -> Cost:
        return forward_cost(config, *shape, loss=True, **validation)

    return step_cost, pass_cost


def generation_cost(config: object, batch_size: int, prompt: int, new_tokens: int, **settings: object) -> Cost:
    """Cost of generating with a KV cache (arguments as in `generation_flops`)."""
    price = lambda c: generation_flops(config, batch_size, prompt, new_tokens, convention=c, **settings)  # noqa: E731
    return Cost(batch_size * (prompt + new_tokens), *_by_convention(config, price))


def _by_convention(config: object, price: Callable[[str], int]) -> tuple[int, int]:
    """Both conventions; they are one for an architecture that is counted, not derived, and counting takes time."""
    exact, course = CONVENTIONS
    first = price(exact)
    return first, price(course) if is_qwen2(config) else first
