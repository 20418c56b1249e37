"""What lies in a model's folder, looked at before any of it is loaded, so that a refusal can say what is there."""

from __future__ import annotations

from pathlib import Path

import transformers
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ..files import UserError, read_json

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
_FORMATS = (".gguf", ".bin", ".pt", ".pth", ".ckpt", ".safetensors", ".h5", ".msgpack", ".onnx")
_QUANTISED = {"quantize_config.json": "GPTQ", "quant_config.json": "AWQ"}  # beside the weights, as older tools write it


def check_kind(name: str, folder: Path) -> None:
    """Refuse a folder that is not a base's: a run's, an adapter's, or one that Git LFS has not filled yet.

    Parameters
    ----------
    name : str
        What the user called it.
    folder : Path

    Raises
    ------
    UserError
        One line that says what the folder holds, and how that is used.
    """
    has_config = (folder / "config.json").is_file()
    if has_config and "settings_sha256" in _read_mapping(folder / "config.json"):
        raise UserError(f"{name}: holds a run, not a base; give 'forecast' or 'evaluate' --run {name}")
    if (folder / ADAPTER_CONFIG).is_file() and not (has_config and any(folder.glob("model*.safetensors"))):
        raise UserError(
            f"{name}: holds a peft adapter, not a base; give 'forecast' or 'evaluate' --model BASE --adapter {name}"
        )
    check_files(name, folder)


def check_adapter(folder: Path) -> None:
    """Refuse a folder that is not an adapter's as `peft` saves it (`UserError`)."""
    config, weights = folder / ADAPTER_CONFIG, folder / ADAPTER_WEIGHTS
    if "settings_sha256" in _read_mapping(folder / "config.json"):
        raise UserError(f"{folder}: holds a run, with its base and scale; give --run {folder} alone")
    if not config.is_file():
        raise UserError(
            f"{folder}: no adapter ({ADAPTER_CONFIG}) there; give the folder that peft's save_pretrained wrote"
        )
    check_files(str(folder), folder)
    if not weights.is_file() and (folder / "adapter_model.bin").is_file():
        raise UserError(
            f"{folder}: adapter_model.bin is pickled, and can run code when it is read; "
            "load it with peft where you trust it, and save it as safetensors"
        )


def check_weights(name: str, folder: Path, weights: list[Path]) -> None:
    """Refuse a folder without a config, or without all of its weights as plain safetensors.

    Parameters
    ----------
    name : str
        What the user called it.
    folder : Path
    weights : list of Path
        Its ``model*.safetensors``.

    Raises
    ------
    UserError
        One line that says what is missing, and what is there in its place.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file() and not (folder / "model.safetensors").is_file():
        shards = sorted({str(shard) for shard in _mapping(_read_mapping(index).get("weight_map")).values()})
        missing = [shard for shard in shards if not (folder / shard).is_file()]
        if missing:
            raise UserError(
                f"{name}: {missing[0]} is not in {folder}, one of {len(missing)} missing of the {len(shards)} files "
                f"that {index.name} names; fetch or copy the model again"
            )
    if not weights:
        others = sorted(path.name for path in folder.iterdir() if path.suffix in _FORMATS)
        there = f", only {', '.join(others[:3])}, which is not read here" if others else ""
        raise UserError(
            f"{name}: no model*.safetensors weights in {folder}{there}; "
            "give a folder in hub format, as save_pretrained writes it"
        )
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{name}: no config.json in {folder}; give a folder in hub format, as save_pretrained writes it"
        )
    method = _quantisation(folder)
    if method:
        raise UserError(
            f"{name}: its weights are quantised ({method}), which is not read here; choose the model they were made from"
        )


def check_sizes(name: str, config: PreTrainedConfig, stored: int) -> None:
    """Refuse a config that asks for a far larger model than its weights can fill, before memory is taken for it (`UserError`)."""
    sizes = ["hidden_size", "vocab_size", "num_hidden_layers", "intermediate_size", "num_attention_heads", "head_dim"]
    found = {size: getattr(config, size, None) or 1 for size in sizes}
    for size, value in found.items():
        if not isinstance(value, int) or value < 1:
            raise UserError(f"{name}: its config.json says {size} {value!r:.40}; fetch or copy the model again")
    width = found["hidden_size"]
    for size in sizes[1:]:  # at half a byte a weight
        if found[size] * width > 2 * stored:
            raise UserError(
                f"{name}: its config.json says {size} {found[size]:,} and hidden_size {width:,}, too large for "
                f"{stored / 1e6:.1f} MB of weights; fetch or copy the model again"
            )


def check_files(name: str, folder: Path) -> None:
    """Refuse a folder where Git still keeps a few lines in place of a large file, or that holds what is no file at all."""
    for path in sorted(folder.iterdir()):
        if path.exists() and not path.is_dir() and not path.is_file():
            raise UserError(f"{name}: {path.name} is a pipe or a device, not a file; copy the folder again")
        small = path.is_file() and path.stat().st_size < 1024
        if small and path.read_bytes().startswith(b"version https://git-lfs"):
            raise UserError(
                f"{name}: {path.name} is a Git LFS pointer, not the file itself; run 'git lfs pull' in the folder, "
                "or fetch it with 'hf download'"
            )


def unloadable(name: str, what: str, error: Exception, remedy: str) -> UserError:
    """What a failure of the libraries is to the user: one line, and the remedy where the folder wants its own code run."""
    if "trust_remote_code" in str(error):
        return _needs_code(name)
    return UserError(f"{name}: {what} ({one_line(error)}); {remedy}")


def _needs_code(name: str) -> UserError:
    return UserError(
        f"{name}: needs code of its own (auto_map), which is never run here; "
        "choose a model whose architecture and tokenizer transformers has"
    )


def read_config(name: str, folder: Path) -> PreTrainedConfig:
    """The configuration in a folder, of an architecture that transformers has itself.

    Raises
    ------
    UserError
        If it has not. Transformers raises other kinds over a damaged file.
    """
    stored = _read_mapping(folder / "config.json")
    kind = stored.get("model_type")
    if kind and kind not in CONFIG_MAPPING:
        if stored.get("auto_map"):
            raise _needs_code(name)
        raise UserError(
            f"{name}: transformers {transformers.__version__} has no architecture {kind!r}; choose another base"
        )
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    config._attn_implementation = None  # a folder could name a kernel on the hub there, which would be fetched and run
    return config


def check_causal(name: str, config: PreTrainedConfig) -> None:
    """Refuse a model that does not write text, or does so by code of its own (`UserError`)."""
    architecture = (config.architectures or [""])[0]
    if architecture in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        return
    if getattr(config, "auto_map", None):
        raise _needs_code(name)
    raise UserError(
        f"{name}: {architecture or 'an unnamed architecture'} is not a causal language model; "
        "choose one that generates text"
    )


def _quantisation(folder: Path) -> str | None:
    """How a folder's weights are quantised, in the words of its config; None for plain numbers."""
    config = _read_mapping(folder / "config.json")
    found = config.get("quantization_config") or config.get("compression_config")
    if found:
        return str(_mapping(found).get("quant_method", "quantization_config"))
    return next((method for file, method in _QUANTISED.items() if (folder / file).is_file()), None)


def _read_mapping(path: Path) -> dict[str, object]:
    """A JSON file that holds a mapping; empty where it does not: transformers says that in its own words."""
    try:
        return _mapping(read_json(path))
    except UserError:
        return {}


def _mapping(value: object) -> dict[str, object]:
    return value if isinstance(value, dict) else {}


def one_line(error: Exception) -> str:
    """A library's message, short enough to stand within one of ours."""
    return " ".join(str(error).split())[:160] or type(error).__name__
