"""Saving and restoring a training run between steps: weights, the optimizer's moments and a small record, without pickle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .files import UserError, atomic_path

MOMENTS = ("step", "exp_avg", "exp_avg_sq", "momentum_buffer")  # of AdamW, and of Muon


def save_state(
    path: Path, parameters: Mapping[str, torch.Tensor], optimizer: torch.optim.Optimizer, record: dict
) -> None:
    """Write everything the next step depends on to one safetensors file, all of it or nothing.

    Parameters
    ----------
    parameters : mapping of name to tensor
        The trained parameters, those the optimizer holds.
    record : dict
        JSON values: step, settings, history so far.
    """
    tensors = {f"weight.{name}": p.detach().contiguous().cpu() for name, p in parameters.items()}
    for name, p in parameters.items():
        for moment, value in optimizer.state.get(p, {}).items():
            tensors[f"{moment}.{name}"] = value.contiguous().cpu()
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata={"record": json.dumps(record)})


def read_record(path: Path) -> dict:
    """The record of a saved state, without its tensors.

    Raises
    ------
    UserError
        If the file is not a state that `save_state` wrote.
    """
    try:
        with safe_open(path, framework="pt") as stream:
            return json.loads(stream.metadata()["record"])
    except (OSError, SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: not a readable training state ({error}); delete it and start the run again") from None


def load_state(path: Path, parameters: Mapping[str, torch.Tensor], optimizer: torch.optim.Optimizer) -> dict:
    """Put saved weights and moments back in place and return the record.

    Raises
    ------
    UserError
        If the file is not such a state, or belongs to other parameters.
    """
    record = read_record(path)
    with safe_open(path, framework="pt") as stream:
        saved = set(stream.keys())
        if {key.removeprefix("weight.") for key in saved if key.startswith("weight.")} != set(parameters):
            raise UserError(
                f"{path}: belongs to a run with other trained parameters; give that run's settings or another folder"
            )
        for name, p in parameters.items():
            with torch.no_grad():
                p.copy_(stream.get_tensor(f"weight.{name}"))
            state = {m: stream.get_tensor(f"{m}.{name}") for m in MOMENTS if f"{m}.{name}" in saved}
            if state:
                # The fused AdamW keeps its step count beside the weights, the others on the CPU.
                there = p.device if optimizer.defaults["fused"] else "cpu"
                optimizer.state[p] = {m: v.to(there if m == "step" else p.device) for m, v in state.items()}
    return record
