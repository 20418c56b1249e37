"""Settings of pre-training and fine-tuning: every default, written once. No torch."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, fields

from .files import UserError
from .flops.costs import Adaptation
from .paths import EMBEDDED as EMBEDDED
from .text import Codec


def default_model() -> str:
    """The base that notebooks and commands use: the environment variable ``M2_MODEL``, or ``embedded``."""
    return os.environ.get("M2_MODEL") or EMBEDDED


def check_least(settings: object, least: dict[str, int]) -> None:
    """Refuse settings below their least values, and what is no number (`UserError`)."""
    for name, value in least.items():
        if not getattr(settings, name) >= value:
            raise UserError(f"{name} {getattr(settings, name)}: must be at least {value}")


def _check_max_grad_norm(settings: object) -> None:
    if not settings.max_grad_norm > 0:  # 0 would not mean "no clipping" but no gradient
        raise UserError(f"max_grad_norm {settings.max_grad_norm}: give a number above 0, such as 1")


@dataclass(frozen=True)
class PretrainSettings:
    """What fixes a pre-training run. With the same settings on the same machine the weights are the same."""

    tokens: int = 8_500_000
    """Length of the schedule: tokens seen in all."""
    batch_size: int = 8
    """Texts a step. A GPU wants 64 and more, and then a higher `learning_rate`."""
    max_length: int = 1024
    """Tokens a text."""
    learning_rate: float = 2.5e-3
    """Muon's, for the matrices of the layers, at the plateau."""
    adamw_learning_rate: float = 1e-3
    """AdamW's, for the embedding, norms and biases, at the plateau."""
    warmup_steps: int = 100
    """Steps of linear warm-up."""
    decay_fraction: float = 0.7
    """Share of the steps, at the end, over which the learning rate falls to zero."""
    weight_decay: float = 0.05
    """On the matrices of the layers, not on the embedding, norms and biases."""
    max_grad_norm: float = 1.0
    """Gradient clipping."""
    log_steps: int = 25
    """Steps between rows of the history."""
    eval_steps: int = 500
    """Steps between validations; a multiple of `log_steps`."""
    eval_texts: int = 8
    """Texts of each family that a validation reads, the same ones every time."""
    save_steps: int = 100
    """Steps between saves."""
    seed: int = 0
    """Of the weights and of the stream of texts."""

    def __post_init__(self):
        least = {f.name: 0 if f.type == "float" or f.name == "seed" else 1 for f in fields(self)}
        check_least(self, least | dict(max_length=2))
        _check_max_grad_norm(self)

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
    """Rank of the update; 0 trains the head bias alone."""
    lora_alpha: float = 16.0
    """The update is scaled by alpha / r."""
    lora_dropout: float = 0.05
    """Dropout on the input of A while training."""
    target_modules: tuple[str, ...] = ("q_proj", "v_proj")
    """Names of the linear layers that get an update, in every block."""


@dataclass(frozen=True)
class TrainSettings(LoraSettings):
    """What fixes a fine-tuning run, together with the data and the base."""

    learning_rate: float = 2e-3
    """AdamW's, at the end of the warm-up. The published Qwen runs used 1e-4 and below; a small base wants more."""
    batch_size: int = 4
    """Windows a step."""
    max_steps: int = 1000
    """Optimizer steps."""
    max_length: int = 512
    """Tokens of the longest window."""
    warmup_ratio: float = 0.05
    """Share of the steps over which the learning rate rises; then it falls to zero along a cosine."""
    weight_decay: float = 0.0
    """AdamW's."""
    max_grad_norm: float = 1.0
    """Gradient clipping."""
    eval_steps: int = 100
    """Steps between validations; the best weights by validation loss are the ones kept."""
    eval_windows: int = 32
    """Validation windows, the same ones every time."""
    save_steps: int = 100
    """Steps between saves that a stopped run goes on from."""
    seed: int = 0
    """Of the LoRA matrices, the order of windows and dropout."""
    precision: int = 2
    """Decimals of the text."""
    rescale: float = 0.0
    """Each time a training series is read, its values are multiplied by e^U(−rescale, rescale)."""
    random_start: int = 0
    """1: half the training windows begin where their series does, half anywhere in it; 0: at multiples of `max_length`."""
    average: float = 0.0
    """Decay, a step, of a running average of the weights, which is validated and kept in their place; 0: none."""
    numeric_head: int = 0
    """1: only the characters of numeric text are scored, in training and validation; 0: the whole vocabulary."""
    gradient_checkpointing: int = 0
    """1: activations inside the layers are computed again for the backward pass, not kept: less memory, more time."""

    def __post_init__(self):
        for setting in fields(self):
            if setting.type == "float":  # 16 and 16.0 are one setting, and have one hash
                object.__setattr__(self, setting.name, float(getattr(self, setting.name)))
        least = dict(batch_size=1, max_steps=1, max_length=2, eval_steps=1, eval_windows=1, save_steps=1, seed=0)
        check_least(self, least)
        if not 0 <= self.rescale <= 2:
            raise UserError(f"rescale {self.rescale}: give a number from 0 to 2, such as 0.7")
        for name in ("random_start", "numeric_head", "gradient_checkpointing"):
            if getattr(self, name) not in (0, 1):
                raise UserError(f"{name} {getattr(self, name)}: give 0 or 1")
        for name in ("warmup_ratio", "lora_dropout", "average"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name} {getattr(self, name)}: give a share from 0 up to 1, such as 0.05")
        if not self.weight_decay >= 0:
            raise UserError(f"weight_decay {self.weight_decay}: give 0 or more, such as 0.01")
        _check_max_grad_norm(self)
        if not 0 < self.learning_rate < 1:
            raise UserError(f"learning_rate {self.learning_rate}: give a number between 0 and 1, such as 1e-4")

    @property
    def adaptation(self) -> Adaptation:
        """What the account has to know of the run."""
        vocabulary = len(Codec(1.0).alphabet) if self.numeric_head else None
        return Adaptation(self.lora_r, self.target_modules, vocabulary, bool(self.gradient_checkpointing))

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
        random_start=1,
    ),
}
