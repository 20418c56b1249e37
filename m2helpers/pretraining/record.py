"""What a pre-training run knows of itself: where it stands, and ``pretraining.json`` once it is done."""

from __future__ import annotations

import platform
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import torch
from transformers import PreTrainedModel

from ..engine.processes import count
from ..engine.resume import State
from ..files import UserError
from ..flops.account import forward_account
from ..models import has_bfloat16
from ..settings import PretrainSettings, changes


class PretrainRow(TypedDict):
    """A row of the history."""

    step: int
    loss: float
    """Mean of the steps since the last row."""
    val_loss: float | None
    """Mean over the families; None where there was no validation."""
    tokens_per_second: float
    learning_rate: float
    """Muon's."""


class Total(TypedDict):
    """Sums over all sittings."""

    tokens: int
    flops: int
    seconds: float


class Sitting(Total):
    """An earlier run whose weights this one started from."""

    machine: str
    seed: int
    val_loss: float | None
    sha256: str


class Record(TypedDict):
    """What `pretrain` returns and ``pretraining.json`` holds; a stopped run has no more than its first fields."""

    settings: dict[str, Any]  # of `PretrainSettings`
    step: int
    seconds: float
    history: list[PretrainRow]
    before: list[Sitting]
    loss_by_family: NotRequired[dict[str, float]]
    architecture: NotRequired[dict[str, int]]
    parameters: NotRequired[int]
    tokens: NotRequired[int]
    flops: NotRequired[int]
    machine: NotRequired[str]
    torch: NotRequired[str]
    total: NotRequired[Total]


@dataclass(kw_only=True)
class PretrainState(State):
    """Where a pre-training run stands."""

    settings: dict[str, Any]
    """Of `PretrainSettings`: what it was started with."""
    before: list[Sitting]
    seconds: float = 0.0
    history: list[PretrainRow] = field(default_factory=list)
    loss_by_family: dict[str, float] = field(default_factory=dict)
    """Of the last validation."""

    def record(self) -> Record:
        """As far as the run has come."""
        record: Record = {
            "settings": self.settings,
            "step": self.step,
            "seconds": self.seconds,
            "history": self.history,
            "before": self.before,
        }
        if self.loss_by_family:
            record["loss_by_family"] = self.loss_by_family
        return record


def check_same(folder: Path, asked: PretrainState, found: PretrainState) -> None:
    """Refuse to resume a run that was started with something else than is asked for now (`UserError`)."""
    if found.before != asked.before:
        raise UserError(f"{folder}: started from other weights; give the same --model to resume")
    if found.settings != asked.settings:
        changed = changes(found.settings, asked.settings)
        raise UserError(f"{folder}: was started with other settings ({changed}); give the same ones to resume")


def finished_record(state: PretrainState, settings: PretrainSettings, model: PreTrainedModel) -> Record:
    """The whole record of a run that is done."""
    tokens = settings.max_steps * settings.batch_size * settings.max_length
    account = forward_account(model.config, settings.batch_size, settings.max_length, head_bias=False)
    flops = settings.max_steps * 3 * account.forward
    sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
    record = state.record()
    record["architecture"] = {name: getattr(model.config, name) for name in sizes}
    record["parameters"] = sum(p.numel() for p in model.parameters())
    record["tokens"], record["flops"] = tokens, flops
    record["machine"] = _machine(model.device.type)
    record["torch"] = torch.__version__
    record["total"] = {
        "tokens": sum(sitting["tokens"] for sitting in state.before) + tokens,
        "flops": sum(sitting["flops"] for sitting in state.before) + flops,
        "seconds": sum(sitting["seconds"] for sitting in state.before) + state.seconds,
    }
    return record


def as_sitting(record: Record, sha256: str) -> Sitting:
    """What the next sitting keeps of a finished one; `sha256` is of its weights."""
    return {
        "tokens": record["tokens"],
        "flops": record["flops"],
        "seconds": record["seconds"],
        "machine": record["machine"],
        "seed": record["settings"]["seed"],
        "val_loss": record["history"][-1]["val_loss"],
        "sha256": sha256,
    }


def _machine(device: str) -> str:
    name = f"{torch.get_num_threads()} CPU threads ({platform.machine()})"
    if device == "cuda":
        name = torch.cuda.get_device_name()
    if count() > 1:
        name = f"{count()} × {name}"
    return name + (", bfloat16" if has_bfloat16(device) else ", float32")
