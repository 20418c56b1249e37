"""Saving and restoring a training run between steps: weights, the optimizer's moments and a small state, without pickle.

The save before the last is kept beside it, so that a file damaged on disk costs one interval and not the run.
"""

from __future__ import annotations

import json
import os
import warnings
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from ..files import UserError, atomic_path, clear_half_written
from .writer import LOCK_NAME

STATE_NAME = "state.safetensors"
PREVIOUS_NAME = "state.previous.safetensors"
MOMENTS = ("step", "exp_avg", "exp_avg_sq", "momentum_buffer", "average")  # of AdamW, of Muon, and of the weights

Tensors = Mapping[str, torch.Tensor]


@dataclass(kw_only=True)
class State:
    """Where a run stands between two steps. A run adds fields of its own; all of them hold JSON values."""

    step: int = 0
    """Steps taken."""
    losses: list[float] = field(default_factory=list)
    """Of the steps since the last row of the history."""
    due: bool = False
    """Whether a validation is still to be made at this step."""


AnyState = TypeVar("AnyState", bound=State)


def has_state(folder: Path) -> bool:
    """Whether a folder holds a run that was stopped."""
    return any((Path(folder) / name).exists() for name in (STATE_NAME, PREVIOUS_NAME))


def save_state(
    folder: Path, parameters: Tensors, optimizer: torch.optim.Optimizer, state: State, best: Tensors | None = None
) -> None:
    """Write everything the next step depends on to ``state.safetensors``, all of it or nothing; keep the one before.

    Parameters
    ----------
    parameters : mapping of name to tensor
        The trained parameters, those the optimizer holds.
    state : State
    best : mapping of name to tensor, optional
        The best weights so far.
    """
    tensors = {f"weight.{name}": p for name, p in parameters.items()}
    tensors |= {f"best.{name}": p for name, p in (best or {}).items()}
    for name, p in parameters.items():
        tensors |= {f"{moment}.{name}": value for moment, value in optimizer.state.get(p, {}).items()}
    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    about = {"record": asdict(state), "checksum": _checksum(tensors)}
    path = Path(folder) / STATE_NAME
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata={"about": json.dumps(about)})
        if path.exists():
            os.replace(path, path.with_name(PREVIOUS_NAME))


def load_state(
    folder: Path,
    parameters: Tensors,
    optimizer: torch.optim.Optimizer,
    kind: type[AnyState],
    best: Tensors | None = None,
) -> AnyState:
    """Put the last save's weights, moments and best weights back in place and return its state.

    If the last save is damaged or missing, the one before is used, with a warning that says so, and the damaged one deleted.

    Parameters
    ----------
    kind : type
        The kind of `State` that was saved.

    Raises
    ------
    UserError
        If neither file is a whole state, or it belongs to other parameters.
    """
    path, damaged = Path(folder) / STATE_NAME, False
    try:
        tensors, state = _read(path, kind)
    except UserError as error:
        try:
            tensors, state = _read(path.with_name(PREVIOUS_NAME), kind)
        except UserError:
            raise UserError(f"{error}; delete it and start the run again") from None
        warnings.warn(f"{error}; resuming from the save before it, step {state.step:,}", stacklevel=2)
        damaged = True
    if {key.removeprefix("weight.") for key in tensors if key.startswith("weight.")} != set(parameters):
        raise UserError(
            f"{path}: belongs to a run with other trained parameters; give that run's settings or another folder"
        )
    if damaged:
        path.unlink(missing_ok=True)  # or the next save would keep it, in the place of the good one
    for name, p in parameters.items():
        with torch.no_grad():
            p.copy_(tensors[f"weight.{name}"])
            if best:
                best[name].copy_(tensors[f"best.{name}"])
        moments = {moment: tensors[f"{moment}.{name}"] for moment in MOMENTS if f"{moment}.{name}" in tensors}
        if moments:
            # The fused AdamW keeps its step count beside the weights, the others on the CPU.
            there = p.device if optimizer.defaults["fused"] else "cpu"
            optimizer.state[p] = {m: v.to(there if m == "step" else p.device) for m, v in moments.items()}
    return state


def delete_state(folder: Path) -> None:
    """Delete a finished run's states, and what was half-written when it was killed.

    The last state goes last: until then the folder is that of a stopped run.
    """
    clear_half_written(folder)
    for name in (LOCK_NAME, PREVIOUS_NAME, STATE_NAME):
        (Path(folder) / name).unlink(missing_ok=True)


def _read(path: Path, kind: type[AnyState]) -> tuple[dict[str, torch.Tensor], AnyState]:
    try:
        with safe_open(path, framework="pt") as stream:
            about = json.loads(stream.metadata()["about"])
        tensors = load_file(path)
        if about["checksum"] != _checksum(tensors):
            raise ValueError("its checksum does not match")
        return tensors, kind(**about["record"])  # a field that is missing or unknown: TypeError
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: not a readable training state ({error})") from None


def _checksum(tensors: Tensors) -> int:
    value = 0
    for name in sorted(tensors):
        value = zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy().data, zlib.crc32(name.encode(), value))
    return value
