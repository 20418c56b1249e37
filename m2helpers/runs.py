"""Run folders: the settings of a fine-tuning run, and what it keeps on disk.

``config.json`` (every setting, versions, hashes of data and base, scale), ``adapter_config.json`` with
``adapter_model.safetensors``, ``history.csv``, ``metrics.json`` once it is evaluated, and ``README.md``, the model card.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import pandas as pd
import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from .data import Dataset
from .engine.resume import delete_state, has_state
from .files import UserError, atomic_folder, read_json, sha256_json, write_text
from .lora import load_adapter, lora_layers, merge, parameter_report, save_adapter
from .models import Base, load_base
from .paths import find_run
from .settings import EMBEDDED, TrainSettings
from .text import Codec, numeric_tokens


@dataclass(frozen=True)
class Run:
    """A finished run, loaded from its folder."""

    base: Base
    """The base with the run's updates merged."""
    codec: Codec
    settings: TrainSettings
    config: dict
    """All of ``config.json``."""

    @property
    def constrained(self) -> bool:
        """Whether its forecasts have to be constrained: a numeric head never learned to leave other characters alone."""
        return bool(self.settings.numeric_head)


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
    folder = find_run(Path(folder))
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    if "settings_sha256" not in config:  # a base has a config.json as well
        raise UserError(f"{folder}: not a run folder (no config.json of a run); give one that 'train' wrote")
    if has_state(folder):
        raise UserError(f"{folder}: this run is not finished; go on with the command that began it, and --resume")
    if not (folder / "history.csv").exists():
        raise UserError(f"{folder}: this run was stopped before its first save; train it again")
    base = load_base(config["base"])
    load_adapter(base.model, folder, base.sha256)
    if merged:
        merge(base.model)
    base.model.eval()
    base = replace(base, run=folder.resolve().name, stage=config["stage"], settings_sha256=config["settings_sha256"])
    return Run(base, Codec(**config["codec"]), _settings_from(config), config)


def _settings_from(config: dict) -> TrainSettings:
    known = {f.name for f in fields(TrainSettings)}
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in config["settings"].items() if k in known}
    return TrainSettings(**values)


def settings_sha256(settings: TrainSettings, dataset: Dataset, base_sha256: str) -> str:
    """The hash that tells two runs apart: of settings, data and base; no paths, devices or versions."""
    return sha256_json(_identity(settings, dataset, base_sha256))


def _identity(settings: TrainSettings, dataset: Dataset, base_sha256: str) -> dict:
    return {"settings": asdict(settings), "data_sha256": dataset.sha256, "base_sha256": base_sha256}


def describe(base: Base, dataset: Dataset, settings: TrainSettings, codec: Codec, stage: str) -> dict:
    """What ``config.json`` holds."""
    return _identity(settings, dataset, base.sha256) | {
        "settings_sha256": settings_sha256(settings, dataset, base.sha256),
        "stage": stage,
        "base": str(Path(base.name).resolve()) if base.name != EMBEDDED and Path(base.name).is_dir() else base.name,
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
    if resume:
        if not has_state(folder):
            raise UserError(f"{folder}: nothing to resume (no saved state); leave --resume out to start the run")
        before = read_json(folder / "config.json")
        if before["settings_sha256"] != config["settings_sha256"]:
            raise UserError(f"{folder}: was started with other settings, data or base; give the same ones to resume")
    elif has_state(folder):
        raise UserError(f"{folder}: holds a run that was stopped; add --resume to go on with it, or delete it")
    elif (folder / "history.csv").exists():  # without it, the run was stopped before its first save: nothing is lost
        raise UserError(f"{folder}: holds a finished run; choose another folder or delete it")
    elif (folder / "config.json").exists() and "settings_sha256" not in read_json(folder / "config.json"):
        raise UserError(f"{folder}: holds a model; choose another folder")


def is_finished(folder: Path) -> bool:
    """Whether a folder holds a run that is done. One killed while it wrote its last files still has its state."""
    return (Path(folder) / "history.csv").exists() and not has_state(folder)


def finish(folder: Path, history: pd.DataFrame, config: dict, settings: TrainSettings, base: Base) -> None:
    """Write a run's adapter, history and model card, and delete the state it would have resumed from."""
    save_adapter(base.model, folder, settings, config["base"], base.sha256)
    write_text(folder / "history.csv", history.to_csv(index=False))
    write_text(folder / "README.md", _model_card(folder.name, history, config, parameter_report(base.model)))
    delete_state(folder)


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


def export_run(folder: Path, output_dir: Path) -> None:
    """Write a run's base with the updates merged into it, and its tokenizer, in hub format.

    A plain model has no place for the head bias: it travels as `sequence_bias` in the generation settings. So `generate`
    writes what our own decoding writes, and the logits of a plain forward pass lack the bias. Where a numeric head was
    trained, `generate` is kept to its characters; it has no grammar, so its forecasts may fail to parse.

    Raises
    ------
    UserError
        If `folder` is not a finished run, or `output_dir` exists already.
    """
    output_dir = Path(output_dir)
    if output_dir.exists():
        raise UserError(f"{output_dir}: exists already; choose another folder or delete it")
    run = load_run(folder)
    model = _plain(run.base.model)
    if run.constrained:
        numeric = set(numeric_tokens(run.codec, run.base.tokenizer).tolist())
        model.generation_config.suppress_tokens = [t for t in range(model.config.vocab_size) if t not in numeric]
    card = (
        (find_run(Path(folder)) / "README.md")
        .read_text(encoding="utf-8")
        .replace("library_name: peft", "library_name: transformers")
    )
    about = (
        "\nThis folder holds the whole model, the adapter merged into it. The trained bias of the LM head is in "
        "`generation_config.json` as `sequence_bias`: `generate` adds it, a plain forward pass does not. Where a numeric "
        "head was trained, `suppress_tokens` there keeps `generate` to the characters of numbers.\n"
    )
    with atomic_folder(output_dir) as temporary:
        model.save_pretrained(temporary)
        run.base.tokenizer.save_pretrained(temporary)
        write_text(temporary / "README.md", card + about)


def _plain(model: PreTrainedModel) -> PreTrainedModel:
    """The same model without wrappers: merged layers as they are, a head without bias, the bias beside it."""
    for name, layer in list(lora_layers(model)):
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.base)
    head = model.get_output_embeddings()
    plain = nn.Linear(head.in_features, head.out_features, bias=False, device="meta")
    plain.weight = head.weight
    model.set_output_embeddings(plain)
    bias = head.bias.detach().tolist()
    model.generation_config.sequence_bias = [[[token], value] for token, value in enumerate(bias) if value]
    return model
