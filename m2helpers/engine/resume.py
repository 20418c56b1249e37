"""Saving and restoring a training run between steps: weights, the optimizer's moments and a small record, without pickle.

The save before the last is kept beside it, so that a file damaged on disk costs one interval and not the run.
"""

from __future__ import annotations

import json
import os
import warnings
import zlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, safe_open, save_file

from ..files import UserError, atomic_path

STATE_NAME = "state.safetensors"
PREVIOUS_NAME = "state.previous.safetensors"
MOMENTS = ("step", "exp_avg", "exp_avg_sq", "momentum_buffer", "average")  # of AdamW, of Muon, and of the weights

Tensors = Mapping[str, torch.Tensor]


def has_state(folder: Path) -> bool:
    """Whether a folder holds a run that was stopped."""
    return any((Path(folder) / name).exists() for name in (STATE_NAME, PREVIOUS_NAME))


def save_state(
    folder: Path, parameters: Tensors, optimizer: torch.optim.Optimizer, record: dict, best: Tensors | None = None
) -> None:
    """Write everything the next step depends on to ``state.safetensors``, all of it or nothing; keep the one before.

    Parameters
    ----------
    parameters : mapping of name to tensor
        The trained parameters, those the optimizer holds.
    record : dict
        JSON values: step, settings, history so far.
    best : mapping of name to tensor, optional
        The best weights so far.
    """
    tensors = {f"weight.{name}": p for name, p in parameters.items()}
    tensors |= {f"best.{name}": p for name, p in (best or {}).items()}
    for name, p in parameters.items():
        tensors |= {f"{moment}.{name}": value for moment, value in optimizer.state.get(p, {}).items()}
    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    about = {"record": record, "checksum": _checksum(tensors)}
    path = Path(folder) / STATE_NAME
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata={"about": json.dumps(about)})
        if path.exists():
            os.replace(path, path.with_name(PREVIOUS_NAME))


def load_state(
    folder: Path, parameters: Tensors, optimizer: torch.optim.Optimizer, best: Tensors | None = None
) -> dict:
    """Put the last save's weights, moments and best weights back in place and return its record.

    If the last save is damaged or missing, the one before is used, with a warning that says so, and the damaged one deleted.

    Raises
    ------
    UserError
        If neither file is a whole state, or it belongs to other parameters.
    """
    path, damaged = Path(folder) / STATE_NAME, False
    try:
        tensors, record = _read(path)
    except UserError as error:
        try:
            tensors, record = _read(path.with_name(PREVIOUS_NAME))
        except UserError:
            raise UserError(f"{error}; delete it and start the run again") from None
        warnings.warn(f"{error}; going on from the save before it, step {record['step']:,}", stacklevel=2)
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
    return record


def delete_state(folder: Path) -> None:
    """Delete a finished run's states, and what was half-written when it was killed.

    The last state goes last: until then the folder is that of a stopped run.
    """
    for path in [*Path(folder).glob(".*.part"), Path(folder) / PREVIOUS_NAME, Path(folder) / STATE_NAME]:
        path.unlink(missing_ok=True)


def _read(path: Path) -> tuple[dict[str, torch.Tensor], dict]:
    try:
        with safe_open(path, framework="pt") as stream:
            about = json.loads(stream.metadata()["about"])
        tensors = load_file(path)
        if about["checksum"] != _checksum(tensors):
            raise ValueError("its checksum does not match")
        return tensors, about["record"]
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: not a readable training state ({error})") from None


def _checksum(tensors: Tensors) -> int:
    value = 0
    for name in sorted(tensors):
        value = zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy(), zlib.crc32(name.encode(), value))
    return value
