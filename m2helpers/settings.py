"""Settings of pre-training and fine-tuning: every default, written once. No torch.

The types of the fields are what is checked, and the string below a field is the help of its flag.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from numbers import Integral, Real
from typing import TYPE_CHECKING, TypeAlias, get_type_hints

from .files import UserError
from .flops.costs import Adaptation
from .paths import EMBEDDED as EMBEDDED
from .paths import is_embedded

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Setting: TypeAlias = bool | int | float | tuple[str, ...]
Recorded: TypeAlias = Setting | str | list[str]  # as JSON gives it back


def default_model() -> str:
    """The base that notebooks and commands use: the environment variable ``M2_MODEL``, or ``embedded``."""
    return os.environ.get("M2_MODEL") or EMBEDDED


def check_least(settings: DataclassInstance, least: Mapping[str, int]) -> None:
    """Refuse settings below their least values, and what is no number (`UserError`)."""
    for name, value in least.items():
        if not getattr(settings, name) >= value:
            raise UserError(f"{name} {getattr(settings, name)}: must be at least {value}")


def canonical(settings: DataclassInstance) -> dict[str, Setting]:
    """Settings by name as they are hashed and recorded: switches as 0 and 1."""
    return {name: int(value) if isinstance(value, bool) else value for name, value in asdict(settings).items()}


def changes(before: Mapping[str, Recorded], after: Mapping[str, Recorded]) -> str:
    """What differs between two records of settings, such as ``seed 0 then, 7 now``; empty when nothing does."""
    names = [name for name in {**before, **after} if json.dumps(before.get(name)) != json.dumps(after.get(name))]
    return "; ".join(f"{name} {_told(before.get(name))} then, {_told(after.get(name))} now" for name in names)


def _told(value: Recorded | None) -> str:
    """A recorded value in words; the record of another version may lack it."""
    if isinstance(value, list | tuple):
        return ",".join(value)
    return "not set" if value is None else str(value)


@cache
def _kinds(settings: type[DataclassInstance]) -> dict[str, type]:
    """The types of a class's fields, by name."""
    return get_type_hints(settings)


def _convert(settings: DataclassInstance) -> None:
    """Give every field the type it is declared with (`UserError` where that cannot be): 16 and 16.0 are one setting."""
    for name, kind in _kinds(type(settings)).items():
        object.__setattr__(settings, name, _as(kind, name, getattr(settings, name)))


def _as(kind: type, name: str, value: object) -> Setting:
    """A value as a field's type; what a user gave may be anything."""
    number = not isinstance(value, bool)
    if kind is bool and value in (0, 1):
        return bool(value)
    if kind is int and number and isinstance(value, Integral):
        return int(value)
    if kind is float and number and isinstance(value, Real):
        return float(value)
    if kind == tuple[str, ...] and isinstance(value, list | tuple) and all(isinstance(item, str) for item in value):
        return tuple(value)
    wanted = {bool: "0 or 1", int: "a whole number", float: "a number"}.get(kind, "a list of names")
    raise UserError(f"{name} {value!r}: give {wanted}")


def _check_max_grad_norm(value: float) -> None:
    if not 0 < value < math.inf:  # 0 would not mean "no clipping" but no gradient
        raise UserError(f"max_grad_norm {value}: give a number above 0, such as 1")


def _check_learning_rate(value: float) -> None:
    if not 0 < value < 1:
        raise UserError(f"learning_rate {value}: give a number between 0 and 1, such as 1e-4")


@dataclass(frozen=True)
class PretrainSettings:
    """What fixes a pre-training run. With the same settings on the same machine the weights are the same."""

    tokens: int = 8_500_000
    """Tokens to train on in all; they fix the length of the learning-rate schedule."""
    batch_size: int = 8
    """Texts per optimizer step. A GPU is best used with 64 or more, and those want a higher learning rate."""
    max_length: int = 1024
    """Longest text, in tokens."""
    learning_rate: float = 2.5e-3
    """Peak learning rate of Muon, which trains the weight matrices of the layers."""
    adamw_learning_rate: float = 1e-3
    """Peak learning rate of AdamW, which trains the embedding, the norms and the biases."""
    warmup_steps: int = 100
    """Steps over which the learning rate rises from zero to its peak."""
    decay_fraction: float = 0.7
    """Share of the steps, at the end of the run, over which the learning rate falls to zero."""
    weight_decay: float = 0.05
    """Weight decay of the layers' weight matrices; embedding, norms and biases have none."""
    max_grad_norm: float = 1.0
    """Norm to which a larger gradient is clipped."""
    log_steps: int = 25
    """Steps between rows of the history of losses."""
    eval_steps: int = 500
    """Steps between validations; give a multiple of log_steps."""
    eval_texts: int = 8
    """Texts of each family of series in a validation, the same ones every time."""
    save_steps: int = 100
    """Steps between saves, from which a stopped run resumes."""
    seed: int = 0
    """Seed of the initial weights and of the stream of texts."""

    def __post_init__(self) -> None:
        _convert(self)
        least = {name: int(kind is int) for name, kind in _kinds(PretrainSettings).items()}
        check_least(self, least | dict(max_length=2, seed=0))
        _check_max_grad_norm(self.max_grad_norm)

    @property
    def max_steps(self) -> int:
        """Optimizer steps that `tokens` buys."""
        return max(1, self.tokens // (self.batch_size * self.max_length))

    def schedule(self, step: int) -> float:
        """Share of the plateau's learning rate at a step, counted from 0."""
        warm = min(1.0, (step + 1) / self.warmup_steps)
        decay = min(1.0, (self.max_steps - step) / max(1.0, self.decay_fraction * self.max_steps))
        return min(warm, decay)


@dataclass(frozen=True)
class LoraSettings:
    """What is adapted, and how much."""

    lora_r: int = 8
    """Rank of the LoRA updates; 0 trains the bias of the LM head alone."""
    lora_alpha: float = 16.0
    """Scale of the LoRA updates: each is multiplied by lora_alpha / lora_r."""
    lora_dropout: float = 0.05
    """Dropout on the input of every LoRA update, in training only: a share from 0 up to 1."""
    target_modules: tuple[str, ...] = ("q_proj", "v_proj")
    """Names of the linear layers that get an update, in every block of the model."""

    def __post_init__(self) -> None:
        _convert(self)
        if not math.isfinite(self.lora_alpha):
            raise UserError(f"lora_alpha {self.lora_alpha}: give a finite number, such as 16")


@dataclass(frozen=True)
class TrainSettings(LoraSettings):
    """What fixes a fine-tuning run, together with the data and the base."""

    learning_rate: float = 2e-3
    """Peak learning rate of AdamW. The published Qwen runs used 1e-4 and below; a small base wants more."""
    batch_size: int = 4
    """Windows of text per optimizer step."""
    max_steps: int = 1000
    """Optimizer steps in all."""
    max_length: int = 512
    """Longest window of text, in tokens."""
    warmup_ratio: float = 0.05
    """Share of the steps over which the learning rate rises to its peak; from there it falls to zero along a cosine."""
    weight_decay: float = 0.0
    """Weight decay of AdamW; 0: none."""
    max_grad_norm: float = 1.0
    """Norm to which a larger gradient is clipped."""
    eval_steps: int = 100
    """Steps between validations; the weights with the lowest validation loss are the ones kept."""
    eval_windows: int = 32
    """Windows of text in a validation, the same ones every time."""
    save_steps: int = 100
    """Steps between saves, from which a stopped run resumes."""
    seed: int = 0
    """Seed of the LoRA matrices, the order of the windows and dropout."""
    precision: int = 2
    """Decimals of a number in the text."""
    rescale: float = 0.0
    """Multiply a training series, each time it is read, by e^u with u drawn evenly from -rescale to rescale; 0: never."""
    random_start: bool = False
    """1: half the training windows begin where their series does, half anywhere in it; 0: at multiples of max_length."""
    average: float = 0.0
    """Decay per step of a running average of the weights, which is validated and kept instead of them; 0: no average."""
    numeric_head: bool = False
    """1: training and validation score only the characters of numeric text; 0: they score the whole vocabulary."""
    gradient_checkpointing: bool = False
    """1: compute the activations inside the layers again for the backward pass, which saves memory and costs time; 0: keep them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        least = dict(batch_size=1, max_steps=1, max_length=2, eval_steps=1, eval_windows=1, save_steps=1, seed=0)
        check_least(self, least | dict(lora_r=0, precision=0))
        if not 0 <= self.rescale <= 2:
            raise UserError(f"rescale {self.rescale}: give a number from 0 to 2, such as 0.7")
        for name in ("warmup_ratio", "lora_dropout", "average"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name} {getattr(self, name)}: give a share from 0 up to 1, such as 0.05")
        if not 0 <= self.weight_decay < math.inf:
            raise UserError(f"weight_decay {self.weight_decay}: give 0 or more, such as 0.01")
        _check_max_grad_norm(self.max_grad_norm)
        _check_learning_rate(self.learning_rate)

    @property
    def adaptation(self) -> Adaptation:
        """What the account has to know of the run."""
        from .text import Codec  # needs numpy, which the command line's help does without

        vocabulary = len(Codec(1.0).alphabet) if self.numeric_head else None
        return Adaptation(self.lora_r, self.target_modules, vocabulary, self.gradient_checkpointing)

    def validates(self, step: int) -> bool:
        """Whether the validation loss is measured after so many steps."""
        return step % self.eval_steps == 0 or step == self.max_steps

    def validations(self, first: int, stop: int) -> int:
        """How many validations fall to the steps after `first`, up to and with `stop`."""
        return sum(map(self.validates, range(first + 1, stop + 1)))

    def rate(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        warmup = max(1, round(self.warmup_ratio * self.max_steps))
        if step < warmup:
            return self.learning_rate * (step + 1) / warmup
        done = (step - warmup) / max(1, self.max_steps - warmup)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


AMORTISED = "amortised"
"""A stage that stands apart from `STAGES`: it trains on series simulated from the law that is fitted to the training split."""


@dataclass(frozen=True)
class InstructSettings(LoraSettings):
    """What fixes an instruction-tuning run, together with the rows and the base. The defaults are those of common QLoRA recipes."""

    lora_r: int = 16
    """Rank of the LoRA updates."""
    lora_alpha: float = 32.0
    """Scale of the LoRA updates: each is multiplied by lora_alpha / lora_r."""
    four_bit: bool = True
    """1: the base's weight matrices are kept in four bits (NF4); 0: in full precision."""
    double_quant: bool = False
    """1: the scales of the four-bit blocks are quantised as well, which saves a little more memory."""
    train_tokens: bool = False
    """1: the embedding of each token that the training rows use is trained as well, for a base that never read their words; 0: LoRA alone."""
    response_only: bool = True
    """1: only the response and its end are scored; 0: the prompt too (labels = input_ids)."""
    learning_rate: float = 2e-4
    """Peak learning rate of AdamW; from there it falls to zero along a line."""
    epochs: int = 3
    """Times that every row is trained on."""
    batch_size: int = 2
    """Rows of a forward pass, in training and in validation."""
    accumulation: int = 2
    """Forward passes of an optimizer step."""
    max_length: int = 512
    """Longest row, in tokens; longer ones are cut."""
    max_grad_norm: float = 1.0
    """Norm to which a larger gradient is clipped."""
    answers: int = 200
    """Validation rows that are answered before and after, to count the exact ones; 0: none."""
    seed: int = 0
    """Seed of the LoRA matrices, the order of the rows and dropout."""
    gradient_checkpointing: bool = False
    """1: compute the activations inside the layers again for the backward pass, which saves memory and costs time; 0: keep them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, dict(lora_r=1, epochs=1, batch_size=1, accumulation=1, max_length=64, answers=0, seed=0))
        if not 0 <= self.lora_dropout < 1:
            raise UserError(f"lora_dropout {self.lora_dropout}: give a share from 0 up to 1, such as 0.05")
        _check_max_grad_norm(self.max_grad_norm)
        _check_learning_rate(self.learning_rate)

    @property
    def adaptation(self) -> Adaptation:
        """What the account has to know of the run."""
        return Adaptation(self.lora_r, self.target_modules, None, self.gradient_checkpointing, head_bias=False)


def instruct_settings(base: str) -> InstructSettings:
    """The settings to start from with a base: those of common recipes, but for the embedded one, which is small and never read a word."""
    return InstructSettings(learning_rate=EMBEDDED_RATE, train_tokens=True) if is_embedded(base) else InstructSettings()


EMBEDDED_RATE = 5e-3  # of instruction tuning; between 3e-3 and 1e-2, which did much alike on validation rows

EVERY_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

STAGES = {
    "initial": TrainSettings(lora_r=4, learning_rate=2.5e-3, max_length=512, max_steps=1000),
    "final": TrainSettings(lora_r=8, learning_rate=1.25e-3, max_length=768, max_steps=1800),
    "extended": TrainSettings(
        lora_r=16,
        lora_alpha=32,
        target_modules=EVERY_LINEAR,
        learning_rate=1.25e-3,  # at 2.5e-3 a run of the embedded base lost its way
        lora_dropout=0.0,
        max_length=1024,
        max_steps=1400,
        rescale=0.2,
        random_start=True,
    ),
}
