"""Run folders: the settings of a fine-tuning run, and what it keeps on disk.

``config.json`` (every setting, versions, hashes of data and base, scale), ``adapter_config.json`` with
``adapter_model.safetensors``, ``history.csv``, ``metrics.json`` once it is evaluated, and ``README.md``, the model card.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast

import pandas as pd
import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from .data import Dataset
from .engine.modelfiles import ADAPTER_CONFIG, ADAPTER_WEIGHTS, check_adapter, check_files
from .engine.resume import delete_state, has_state
from .files import UserError, atomic_folder, read_json, sha256_file, sha256_json, write_text
from .lora import adapter_settings, load_adapter, lora_layers, merge, parameter_report, save_adapter
from .models import Base, load_base
from .paths import find_run
from .settings import Recorded, Setting, TrainSettings, canonical, changes
from .simulator import Law
from .text import Codec, numeric_tokens

CONFIG_NAME = "config.json"
HISTORY_NAME = "history.csv"


class RunConfig(TypedDict):
    """What ``config.json`` holds."""

    settings: dict[str, Setting]
    """As `settings.canonical` gives them."""
    data_sha256: str
    base_sha256: str
    settings_sha256: str
    """Over the three before, and the law's hash: tells two runs apart."""
    stage: str
    """Part of the plan that the run belongs to."""
    base: str
    """``embedded``, a hub name, or the whole path of a folder."""
    data: str
    """Name of the data's file."""
    scale: float
    codec: dict[str, Any]
    """The fields of a `Codec`."""
    versions: dict[str, str]
    """Of Python, torch and transformers."""
    law_sha256: NotRequired[str]
    """Of the law that its training series were drawn from, where they are not the training split's."""


@dataclass(frozen=True)
class Run:
    """A finished run, loaded from its folder."""

    base: Base
    """The base with the run's updates merged."""
    codec: Codec
    settings: TrainSettings
    config: RunConfig
    """All of ``config.json``."""

    @property
    def constrained(self) -> bool:
        """Whether its forecasts have to be constrained: a numeric head never learned to leave other characters alone."""
        return self.settings.numeric_head


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
    config = read_config(folder)
    if config is None and not (folder / CONFIG_NAME).is_file() and (folder / ADAPTER_CONFIG).is_file():
        raise UserError(f"{folder}: holds a peft adapter, not a run; give --model BASE --adapter {folder}")
    if config is None:
        raise UserError(f"{folder}: not a run folder (no config.json of a run); give one that 'train' wrote")
    if has_state(folder):
        raise UserError(f"{folder}: this run is not finished; go on with the command that began it, and --resume")
    if not (folder / HISTORY_NAME).exists():
        raise UserError(f"{folder}: this run was stopped before its first save; train it again")
    codec, settings = _recorded(folder, config)
    check_files(str(folder), folder)
    base = load_base(config["base"])
    load_adapter(base.model, folder, base.sha256)
    if merged:
        merge(base.model)
    base.model.eval()
    base = replace(base, run=folder.resolve().name, stage=config["stage"], settings_sha256=config["settings_sha256"])
    return Run(base, codec, settings, config)


def _recorded(folder: Path, config: RunConfig) -> tuple[Codec, TrainSettings]:
    """A run's codec and settings, once its record is known to be one (`UserError`)."""
    try:
        texts = [
            config["base"],
            config["stage"],
            config["settings_sha256"],
            config["data_sha256"],
            config["base_sha256"],
        ]
        if not all(isinstance(text, str) and text.isprintable() for text in texts):
            raise TypeError("a name that is no text")
        return Codec(**config["codec"]), settings_of(config)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{folder / CONFIG_NAME}: not a run's record ({error}); restore it, or train the run again"
        ) from None


def read_config(folder: Path) -> RunConfig | None:
    """What a run folder's ``config.json`` holds; None if there is none, or it is a model's."""
    path = Path(folder) / CONFIG_NAME
    config = read_json(path) if path.is_file() else None
    return cast(RunConfig, config) if isinstance(config, dict) and "settings_sha256" in config else None


def settings_of(config: RunConfig) -> TrainSettings:
    """The settings a run was made with; those that this version does not know are left out."""
    known = {f.name for f in fields(TrainSettings)}
    values: dict[str, Any] = {name: value for name, value in config["settings"].items() if name in known}
    return TrainSettings(**values)  # which checks their types


def load_adapted(name: str | None, folder: Path) -> Base:
    """Load a base (see `load_base` for its name) and merge an adapter into it that `peft` trained: no run, so no scale.

    Raises
    ------
    UserError
        If the folder holds no such adapter, or one whose update is not plain LoRA, or the base does not fit it.
    """
    folder = Path(folder)
    check_adapter(folder)
    settings = adapter_settings(folder)  # refused before the base is read
    base = load_base(name)
    load_adapter(base.model, folder, base.sha256)
    merge(base.model).eval()
    identity = {"settings": asdict(settings), "adapter_sha256": sha256_file(folder / ADAPTER_WEIGHTS)}
    identity["base_sha256"] = base.sha256
    return replace(base, run=folder.resolve().name, stage="adapter", settings_sha256=sha256_json(identity))


def settings_sha256(settings: TrainSettings, dataset: Dataset, base_sha256: str, law_sha256: str | None = None) -> str:
    """The hash that tells two runs apart: of settings, data, base and, where there is one, law; no paths, devices or versions."""
    identity = {"settings": canonical(settings), "data_sha256": dataset.sha256, "base_sha256": base_sha256}
    if law_sha256:
        identity["law_sha256"] = law_sha256
    return sha256_json(identity)


def describe(
    base: Base, dataset: Dataset, settings: TrainSettings, codec: Codec, stage: str, law: Law | None = None
) -> RunConfig:
    """What ``config.json`` will hold."""
    config: RunConfig = {
        "settings": canonical(settings),
        "data_sha256": dataset.sha256,
        "base_sha256": base.sha256,
        "settings_sha256": settings_sha256(settings, dataset, base.sha256, law.sha256 if law else None),
        "stage": stage,
        "base": base.recorded_name,
        "data": Path(dataset.path).name,
        "scale": codec.scale,
        "codec": asdict(codec),
        "versions": {
            "python": sys.version.split()[0],
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    if law:
        config["law_sha256"] = law.sha256
    return config


def check_folder(folder: Path | None, config: RunConfig, resume: bool) -> None:
    """Refuse a folder that a run would overwrite, or that holds nothing this run could resume (`UserError`)."""
    if folder is None:
        if resume:
            raise UserError("resume needs the output_dir of the run to resume")
        return
    if resume:
        if not has_state(folder):
            raise UserError(f"{folder}: nothing to resume (no saved state); leave --resume out to start the run")
        check_files(str(folder), folder)
        before = read_config(folder)
        if before:
            _recorded(folder, before)
        else:
            raise UserError(f"{folder}: its {CONFIG_NAME} is missing or not a run's; restore it, or delete the folder")
        if before["settings_sha256"] != config["settings_sha256"]:
            changed = _all_changes(before, config)
            raise UserError(f"{folder}: was started with other settings ({changed}); give the same ones to resume")
    elif has_state(folder):
        raise UserError(f"{folder}: holds a run that was stopped; add --resume to go on with it, or delete it")
    elif (folder / HISTORY_NAME).exists():  # without it, the run was stopped before its first save: nothing is lost
        raise UserError(f"{folder}: holds a finished run; choose another folder or delete it")
    elif (folder / CONFIG_NAME).exists() and read_config(folder) is None:
        raise UserError(f"{folder}: holds a model; choose another folder")


def _all_changes(before: RunConfig, after: RunConfig) -> str:
    """What differs between two runs: settings, data, base."""
    then: dict[str, Recorded] = {**before["settings"]}
    now: dict[str, Recorded] = {**after["settings"]}
    if before["data_sha256"] != after["data_sha256"]:
        then["data"], now["data"] = (f"{config['data']} ({config['data_sha256'][:12]}…)" for config in (before, after))
    if before["base_sha256"] != after["base_sha256"]:
        then["base"], now["base"] = (f"{config['base']} ({config['base_sha256'][:12]}…)" for config in (before, after))
    then["law"], now["law"] = (config.get("law_sha256", "none")[:12] for config in (before, after))
    return changes(then, now)


def is_finished(folder: Path) -> bool:
    """Whether a folder holds a run that is done. One killed while it wrote its last files still has its state."""
    return (Path(folder) / HISTORY_NAME).exists() and not has_state(folder)


def finish(folder: Path, history: pd.DataFrame, config: RunConfig, settings: TrainSettings, base: Base) -> None:
    """Write a run's adapter, history and model card, and delete the state it would have resumed from."""
    save_adapter(base.model, folder, settings, config["base"], base.sha256)
    write_text(folder / HISTORY_NAME, history.to_csv(index=False))
    write_text(folder / "README.md", _model_card(folder.name, history, config, parameter_report(base.model)))
    delete_state(folder)


_TOLD = """its training series are no recorded ones, but simulated without end from the equations of the data, with
parameters drawn from a distribution fitted to the training split. Do not compare it with runs that see that split alone."""


def _model_card(name: str, history: pd.DataFrame, config: RunConfig, counts: dict[str, int]) -> str:
    settings, best = config["settings"], history.loc[history["val_loss"].idxmin()]
    rows = "\n".join(f"| `{key}` | {value} |" for key, value in settings.items())
    law = f"\n\n**It is told the law**: {_TOLD}" if "law_sha256" in config else ""
    return f"""---
library_name: peft
base_model: {config["base"]}
---
# {name}: LoRA adapter on base `{config["base"]}`

Trained by this project to forecast predator–prey series written as LLMTime text (data `{config["data"]}`,
SHA-256 {config["data_sha256"][:16]}…; base SHA-256 {config["base_sha256"][:16]}…). Text is value × {config["scale"]:.6g},
{config["codec"]["precision"]} decimals. Load it with `m2helpers.load_run`, or with `peft` on the base with its head bias added.{law}

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
        .read_text(encoding="utf-8", errors="replace")
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
