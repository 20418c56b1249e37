"""Run folders: the settings of a fine-tuning run, and what it keeps on disk.

``config.json`` (every setting, versions, hashes of data and base, scale), ``adapter_config.json`` with
``adapter_model.safetensors``, ``history.csv``, ``metrics.json`` once it is evaluated, and ``README.md``, the model card.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import transformers

from .data import Dataset
from .files import UserError, read_json, sha256_json, write_text
from .lora import LoraSettings, load_adapter, merge, parameter_report
from .models import Base, load_base
from .text import Codec

STATE_NAME = "state.safetensors"


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

    def __post_init__(self):
        least = dict(batch_size=1, max_steps=1, max_length=2, eval_steps=1, eval_windows=1, save_steps=1, seed=0)
        for name, value in least.items():
            if getattr(self, name) < value:
                raise UserError(f"{name} {getattr(self, name)}: must be at least {value}")
        for name in ("warmup_ratio", "lora_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name} {getattr(self, name)}: give a share from 0 up to 1, such as 0.05")
        if not 0 < self.learning_rate < 1:
            raise UserError(f"learning_rate {self.learning_rate}: give a number between 0 and 1, such as 1e-4")

    def rate(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        warmup = max(1, round(self.warmup_ratio * self.max_steps))
        if step < warmup:
            return self.learning_rate * (step + 1) / warmup
        done = (step - warmup) / max(1, self.max_steps - warmup)
        return self.learning_rate * 0.5 * (1 + float(np.cos(np.pi * done)))


STAGES = {
    "initial": TrainSettings(lora_r=4, max_length=512, max_steps=1000),
    "final": TrainSettings(lora_r=8, max_length=768, max_steps=600),
}


@dataclass(frozen=True)
class Run:
    """A finished run, loaded from its folder."""

    base: Base
    """The base with the run's updates merged."""
    codec: Codec
    settings: TrainSettings
    config: dict
    """All of ``config.json``."""


def load_run(folder: Path, *, merged: bool = True) -> Run:
    """Load a finished run: its base, its updates, and the codec with its scale.

    Parameters
    ----------
    folder : Path
    merged : bool
        Merge the updates into the weights, as for forecasting; False leaves them apart, to be looked at.

    Raises
    ------
    UserError
        If the folder is not a finished run, or its base has changed since.
    """
    folder = Path(folder)
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    if "settings_sha256" not in config:  # a base has a config.json as well
        raise UserError(f"{folder}: not a run folder (no config.json of a run); give one that 'train' wrote")
    if (folder / STATE_NAME).exists():
        raise UserError(f"{folder}: this run is not finished; go on with 'train --resume --output-dir {folder}'")
    if not (folder / "history.csv").exists():
        raise UserError(f"{folder}: this run was stopped before its first save; train it again")
    base = load_base(config["base"])
    load_adapter(base.model, folder, base.sha256)
    if merged:
        merge(base.model)
    base.model.eval()
    return Run(base, Codec(**config["codec"]), _settings_from(config), config)


def _settings_from(config: dict) -> TrainSettings:
    known = {f.name for f in fields(TrainSettings)}
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in config["settings"].items() if k in known}
    return TrainSettings(**values)


def describe(base: Base, dataset: Dataset, settings: TrainSettings, codec: Codec) -> dict:
    """What ``config.json`` holds. The settings hash covers settings, data and base: no paths, devices or versions."""
    identity = {"settings": asdict(settings), "data_sha256": dataset.sha256, "base_sha256": base.sha256}
    return identity | {
        "settings_sha256": sha256_json(identity),
        "base": base.name,
        "data": Path(dataset.path).name,
        "scale": codec.scale,
        "codec": asdict(codec),
        "versions": {
            "python": sys.version.split()[0],
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def check_folder(folder: Path | None, config: dict, resume: bool) -> None:
    """Refuse a folder that a run would overwrite, or that holds nothing this run could go on from (`UserError`)."""
    if folder is None:
        if resume:
            raise UserError("resume needs the output_dir of the run to go on with")
        return
    state = folder / STATE_NAME
    if resume:
        if not state.exists():
            raise UserError(f"{folder}: nothing to resume (no {STATE_NAME}); leave --resume out to start the run")
        before = read_json(folder / "config.json")
        if before["settings_sha256"] != config["settings_sha256"]:
            raise UserError(f"{folder}: was started with other settings, data or base; give the same ones to resume")
    elif state.exists():
        raise UserError(f"{folder}: holds a run that was stopped; add --resume to go on with it, or delete it")
    elif (folder / "history.csv").exists():  # without it, the run was stopped before its first save: nothing is lost
        raise UserError(f"{folder}: holds a finished run; choose another folder or delete it")


def finish(folder: Path, history: pd.DataFrame, config: dict, model: torch.nn.Module) -> None:
    """Write a run's history and model card, and delete the state it would have resumed from."""
    write_text(folder / "history.csv", history.to_csv(index=False))
    write_text(folder / "README.md", _model_card(folder.name, history, config, parameter_report(model)))
    (folder / STATE_NAME).unlink()


def _model_card(name: str, history: pd.DataFrame, config: dict, counts: dict[str, int]) -> str:
    settings, best = config["settings"], history.loc[history["val_loss"].idxmin()]
    rows = "\n".join(f"| `{key}` | {value} |" for key, value in settings.items())
    return f"""---
library_name: peft
base_model: {config["base"]}
---
# {name}: LoRA adapter on base `{config["base"]}`

Trained by this project to forecast predator–prey series written as LLMTime text (data `{config["data"]}`,
SHA-256 {config["data_sha256"][:16]}…; base SHA-256 {config["base_sha256"][:16]}…). Text is value × {config["scale"]:.6g},
{config["codec"]["precision"]} decimals. Load it with `m2helpers.load_run`, or with `peft` on the base with its head bias added.

| | |
|---|---|
| trainable parameters | {counts["trainable"]:,} ({counts["lora"]:,} LoRA, {counts["head_bias"]:,} head bias) of {counts["base"]:,} |
| best validation loss | {best["val_loss"]:.4f} nats a token, at step {int(best["step"]):,} |
| FLOPs, training and validation, exact account | {int(history["flops"].iloc[-1]):.4g} |

| setting | value |
|---|---|
{rows}

Its forecasts are measured in `metrics.json`, its losses in `history.csv`.
"""
