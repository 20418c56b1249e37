"""The folder of an instruction-tuning run: what it is, what it measured, and the adapter, as a folder and as one zip."""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypedDict

import pandas as pd
import torch
import transformers
from transformers import PreTrainedModel

from ..files import (
    UserError,
    atomic_folder,
    atomic_path,
    clear_half_written,
    read_json,
    sha256_json,
    write_json,
    write_text,
)
from ..models import Base
from ..settings import InstructSettings, canonical, changes
from .answers import Answered
from .rows import Row, end_and_pad

CONFIG_NAME, METRICS_NAME, HISTORY_NAME = "instruct.json", "metrics.json", "history.csv"
ADAPTERS, ZIP_NAME = "adapters", "adaptermodel.zip"
_SAVES = "checkpoint-*"  # as Trainer names them
_LONG_AGO = (1980, 1, 1, 0, 0, 0)  # the least that a zip can say


class Config(TypedDict):
    """What ``instruct.json`` holds."""

    settings: dict[str, Any]
    rows: dict[str, int]
    rows_sha256: str
    base: str
    base_sha256: str
    settings_sha256: str
    """Over settings, rows and base: tells two runs apart."""
    versions: dict[str, str]


class Metrics(TypedDict):
    """What ``metrics.json`` holds."""

    trainable: int
    parameters: int
    before: Answered
    after: Answered | None
    """None until the run is done."""


def describe(base: Base, rows: Mapping[str, Sequence[Row]], settings: InstructSettings) -> Config:
    """What ``instruct.json`` will hold."""
    identity = {
        "settings": canonical(settings),
        "rows_sha256": sha256_json({part: [list(row) for row in part_rows] for part, part_rows in rows.items()}),
        "base_sha256": base.sha256,
    }
    return {
        "settings": canonical(settings),
        "rows": {part: len(part_rows) for part, part_rows in rows.items()},
        "rows_sha256": str(identity["rows_sha256"]),
        "base": base.recorded_name,
        "base_sha256": base.sha256,
        "settings_sha256": sha256_json(identity),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "peft": version("peft")},
    }


def check(folder: Path | None, config: Config, resume: bool) -> Path | None:
    """Refuse a folder that a run would overwrite, or where there is nothing to resume (`UserError`).

    Returns
    -------
    Path or None
        The save to resume from.
    """
    if folder is None:
        if resume:
            raise UserError("resume needs the output_dir of the run to resume")
        return None
    folder = Path(folder)
    last = _last_save(folder)
    if (folder / ZIP_NAME).exists() and last is None:
        raise UserError(f"{folder}: holds a finished run; choose another folder or delete it")
    if resume and last is None:
        raise UserError(f"{folder}: nothing to resume (no epoch was saved); leave --resume out to start the run")
    if last is not None and not resume:
        raise UserError(f"{folder}: holds a run that was stopped; add --resume to go on with it, or delete it")
    if last is None:
        if any((folder / name).exists() for name in ("config.json", "model.safetensors", "adapter_config.json")):
            raise UserError(f"{folder}: holds a model or another run; choose another folder")
        return None
    before: Config = read_json(folder / CONFIG_NAME)
    if before["settings_sha256"] != config["settings_sha256"]:
        then, now = (
            {**c["settings"], "rows": c["rows_sha256"][:12], "base": c["base_sha256"][:12]} for c in (before, config)
        )
        raise UserError(
            f"{folder}: was started with other settings ({changes(then, now)}); give the same ones to resume"
        )
    return last


def _last_save(folder: Path) -> Path | None:
    """The latest save that is whole: what it writes last can be read."""
    saves = sorted(folder.glob(_SAVES), key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
    for path in saves:
        try:
            read_json(path / "trainer_state.json")
        except UserError:
            continue
        return path
    return None


def history_of(log: Sequence[Mapping[str, float]]) -> pd.DataFrame:
    """A run's log as a table, a row a step: step, epoch, loss, val_loss, learning_rate, flops."""
    names = {"eval_loss": "val_loss"}
    rows = [{names.get(name, name): value for name, value in entry.items()} for entry in log]
    columns = ["epoch", "loss", "val_loss", "learning_rate", "flops"]
    return pd.DataFrame(rows).reindex(columns=["step", *columns]).groupby("step", as_index=False)[columns].last()


def read_metrics(folder: Path) -> Metrics:
    """What a run has measured so far."""
    return read_json(Path(folder) / METRICS_NAME)


def finish(
    folder: Path, model: PreTrainedModel, base: Base, config: Config, history: pd.DataFrame, metrics: Metrics
) -> None:
    """Write a run's adapter, its zip and its records, and delete what it would have resumed from."""
    folder = Path(folder)
    shutil.rmtree(folder / ADAPTERS, ignore_errors=True)  # of a run that was killed as it wrote it
    with atomic_folder(folder / ADAPTERS) as temporary:
        save_adapter(model, base, temporary, _card(folder.resolve().name, config, history, metrics))
    write_text(folder / HISTORY_NAME, history.to_csv(index=False))
    write_json(folder / METRICS_NAME, metrics)
    write_zip(folder / ADAPTERS, folder / ZIP_NAME)
    clear_half_written(folder)
    for path in folder.glob(_SAVES):
        shutil.rmtree(path)


def save_adapter(model: PreTrainedModel, base: Base, folder: Path, card: str) -> None:
    """Write an adapter in `peft`'s format with its tokenizer, whose padding is not its end, and a model card."""
    for config in model.peft_config.values():
        config.base_model_name_or_path = base.recorded_name
    model.save_pretrained(folder, save_embedding_layers=False)  # "auto" would look the base up on a hub
    config = read_json(folder / "adapter_config.json")
    config["target_modules"] = sorted(config["target_modules"])  # a set: another order each time
    write_json(folder / "adapter_config.json", config)
    tokenizer, (_, pad) = base.tokenizer, end_and_pad(base.tokenizer)
    if pad in tokenizer.added_tokens_decoder:
        tokenizer.pad_token_id = pad
    tokenizer.save_pretrained(folder)
    write_text(folder / "README.md", card)


def write_zip(folder: Path, path: Path) -> None:
    """Pack a folder's files: always the same bytes for the same files, whenever and wherever it is done."""
    with atomic_path(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        for file in sorted(folder.iterdir()):
            entry = zipfile.ZipInfo(f"{folder.name}/{file.name}", _LONG_AGO)
            entry.external_attr, entry.create_system = 0o644 << 16, 3
            archive.writestr(entry, file.read_bytes())


def parameter_line(metrics: Metrics) -> str:
    """Trainable parameters, all of them, and their share, as `peft` prints them."""
    trainable, parameters = metrics["trainable"], metrics["parameters"]
    share = 100 * trainable / parameters
    return f"trainable params: {trainable:,} || all params: {parameters:,} || trainable%: {share:.4f}"


def _card(name: str, config: Config, history: pd.DataFrame, metrics: Metrics) -> str:
    before, after, settings = metrics["before"], metrics["after"], config["settings"]
    assert after is not None  # the run is done
    rows = "\n".join(f"| `{key}` | {value} |" for key, value in settings.items())
    last = history.dropna(subset="val_loss").iloc[-1]
    return f"""---
library_name: peft
base_model: {config["base"]}
---
# {name}: LoRA adapter for instructions, on base `{config["base"]}`

Tuned by this project on {config["rows"]["train"]:,} instructions, over the base {"in four bits (NF4)" if settings["four_bit"] else "in full precision"}; `peft` opens it over
either. SHA-256 of the rows {config["rows_sha256"][:16]}…, of the base {config["base_sha256"][:16]}….

| | |
|---|---|
| parameters | {parameter_line(metrics).replace("||", "·")} |
| exact answers on {after["rows"]:,} validation rows | {before["exact"]:,} before, {after["exact"]:,} after |
| validation loss of the responses | {last["val_loss"]:.4f} nats a token |
| FLOPs, training and validation, exact account | {int(last["flops"]):.4g} |

| setting | value |
|---|---|
{rows}
"""
