"""Base models: the embedded one this project ships, or any causal language model by hub name or local folder.

Both go the same way: a folder in hub format is found (or fetched), read, and given a trainable LM-head bias.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import huggingface_hub
import psutil
import torch
import transformers
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2Tokenizer,
)

from .engine.modelfiles import (
    ADAPTER_CONFIG,
    check_causal,
    check_kind,
    check_sizes,
    check_weights,
    one_line,
    read_config,
    unloadable,
)
from .files import UserError, sha256_files
from .paths import EMBEDDED, find_base, hub_files, is_hub_name, short_name, weight_files
from .settings import default_model

LARGE = 2**28  # bytes of weights; from there on, precision is a matter of time and memory
transformers.utils.logging.disable_progress_bar()  # it would stay behind in notebooks
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


@dataclass(frozen=True)
class Base:
    """A base model ready to use."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    """What the user called it: ``embedded``, a hub name or a folder."""
    sha256: str
    """Over its weight files: an adapter records it and refuses another base."""
    run: str | None = None
    """Name of the run whose updates it carries; None for the base alone."""
    stage: str = "untrained"
    """Part of the plan that the run belongs to."""
    settings_sha256: str = ""
    """Of that run."""

    @property
    def short_name(self) -> str:
        """The last part of the name, for folders and headings: ``Qwen2.5-0.5B-Instruct``."""
        return short_name(self.name)

    @property
    def recorded_name(self) -> str:
        """The name as a record keeps it: of a folder, its whole path."""
        return str(Path(self.name).resolve()) if self.name != EMBEDDED and Path(self.name).is_dir() else self.name

    @property
    def pad_id(self) -> int:
        """The token that fills the left of a batch; its value does not matter, because it is masked."""
        return self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0


def load_base(
    name: str | None = None,
    *,
    head_bias: bool = True,
    dtype: str | None = None,
    quantised: BitsAndBytesConfig | None = None,
) -> Base:
    """Load a base model and its tokenizer, in evaluation mode, on the first of CUDA, MPS and CPU that there is.

    The environment variables ``M2_DTYPE`` and ``M2_DEVICE`` overrule the choice of precision and device.

    Parameters
    ----------
    name : str, optional
        ``embedded``, a hub name such as ``Qwen/Qwen2.5-0.5B-Instruct``, or a folder in hub format.
        By default `default_model()`.
    head_bias : bool
        Add the trainable LM-head bias, zero at first (see `add_head_bias`).
    dtype : {"float32", "bfloat16"}, optional
        Of the weights. By default bfloat16 for a large model where the device is faster at it, else float32: a small
        model then gives the same forecasts on every machine.
    quantised : BitsAndBytesConfig, optional
        How the weight matrices of the layers are kept, if in fewer bits (`m2helpers.instruct.quantised`).

    Raises
    ------
    UserError
        If the model cannot be found or fetched, is not a causal language model, has no safetensors weights, or needs
        more memory than is free.
    """
    name = name or default_model()
    _refuse_file(name)
    folder = fetch_base(name)
    check_kind(name, folder)
    weights = weight_files(folder)  # not a training state or an adapter beside them
    check_weights(name, folder, weights)
    device = choose_device()
    stored = sum(path.stat().st_size for path in weights)
    precision = _choose_dtype(dtype, stored, device)
    try:
        config = read_config(name, folder)
        check_causal(name, config)
        check_sizes(name, config, stored)
        needed = stored * precision.itemsize // getattr(config.dtype, "itemsize", 4)
        _check_memory(name, needed, device)
        model = _read_weights(folder, config, precision, device, quantised)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        _check_tokenizer(name, folder, tokenizer, model)
    except UserError:
        raise
    except Exception as error:  # the libraries raise many kinds over a stranger's files
        raise unloadable(name, f"cannot be loaded from {folder}", error, "fetch or copy the model again") from error
    if (folder / ADAPTER_CONFIG).is_file():
        warnings.warn(
            f"{name}: an adapter lies beside the weights; the base is loaded without it (--adapter {folder} applies it)",
            stacklevel=2,
        )
    if head_bias:
        add_head_bias(model)
    # Without an instruct model's sampling flags and repetition penalty, which are for chat: digits repeat.
    kept = model.generation_config
    ends = dict(eos_token_id=kept.eos_token_id, pad_token_id=kept.pad_token_id, bos_token_id=kept.bos_token_id)
    model.generation_config = GenerationConfig(do_sample=False, **ends)
    if not quantised:
        cast(nn.Module, model).to(device)  # in place; transformers' own `to` has no types
    return Base(model.eval(), tokenizer, name, sha256_files(weights))


def _refuse_file(name: str) -> None:
    if Path(name).is_file():
        raise UserError(f"{name}: is a file; give a folder in hub format, with config.json and *.safetensors")


def _read_weights(
    folder: Path, config: PreTrainedConfig, dtype: torch.dtype, device: str, quantised: BitsAndBytesConfig | None
) -> PreTrainedModel:
    """The model in a folder, all of its weights read from there and nothing else."""
    # What is quantised is so once it is on its device, and stays there.
    there = {"quantization_config": quantised, "device_map": {"": device}} if quantised else {}
    with _quiet():  # of missing weights transformers prints a table; here they are an error of one line
        # An adapter beside the weights would be applied without a word: it is looked for where none can be.
        loaded = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            trust_remote_code=False,
            output_loading_info=True,
            adapter_kwargs={"subfolder": "no-adapter"},
            **there,
        )
    model, report = cast("tuple[PreTrainedModel, dict[str, set]]", loaded)  # as output_loading_info asks for
    # Both of these transformers would draw at random, and go on.
    if report["missing_keys"]:
        raise ValueError(f"the weights lack {min(report['missing_keys'])}")
    if report["mismatched_keys"]:
        key, stored, needed = min(report["mismatched_keys"])
        raise ValueError(f"{key} is {tuple(stored)} in the weights and {tuple(needed)} by config.json")
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    before = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.utils.logging.set_verbosity(before)


def _check_tokenizer(name: str, folder: Path, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    if not tokenizer("1")["input_ids"]:  # where its files are missing, transformers makes an empty one
        raise UserError(f"{name}: no tokenizer in {folder} (tokenizer.json); copy the tokenizer's files there")
    largest, rows = max(tokenizer.get_vocab().values()), cast(nn.Embedding, model.get_input_embeddings()).num_embeddings
    if largest >= rows:
        raise UserError(
            f"{name}: the tokenizer has ids up to {largest:,} and the model a vocabulary of {rows:,}; "
            "copy the tokenizer that belongs to the model"
        )


def choose_device() -> str:
    """The first of CUDA, MPS and CPU that there is, or what ``M2_DEVICE`` names (`UserError` if it is not there)."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    found = [device for device, available in there.items() if available]
    asked = os.environ.get("M2_DEVICE") or found[0]
    if asked not in found:
        raise UserError(f"M2_DEVICE {asked!r}: this machine has {', '.join(found)}")
    return asked


def _choose_dtype(asked: str | None, stored: int, device: str) -> torch.dtype:
    """The precision asked for, or the one that suits so many bytes of weights (see `load_base`)."""
    usual = "bfloat16" if stored > LARGE and has_bfloat16(device) else "float32"
    name = asked or os.environ.get("M2_DTYPE") or usual
    if name not in ("float32", "bfloat16"):
        raise UserError(f"dtype {name!r}: choose float32 or bfloat16")
    return torch.float32 if name == "float32" else torch.bfloat16


def _check_memory(name: str, needed: int, device: str) -> None:
    free = psutil.virtual_memory().available  # weights are read there first, wherever they go
    if device == "cuda":
        free = min(free, torch.cuda.mem_get_info()[0])
    if needed > free:
        raise UserError(
            f"{name}: its weights need {needed / 1e9:.1f} GB of memory and {free / 1e9:.1f} GB are free; "
            "close other programs, or choose a smaller base"
        )


def load_config(name: str) -> PreTrainedConfig:
    """The configuration of a base, without its weights (see `load_base` for names and errors)."""
    _refuse_file(name)
    folder = fetch_base(name, weights=False)
    check_kind(name, folder)
    try:
        return read_config(name, folder)
    except UserError:
        raise
    except Exception as error:  # as in `load_base`
        raise unloadable(name, f"no usable config.json in {folder}", error, "give a folder in hub format") from error


class BiasedHead(nn.Linear):
    """A head whose bias may be of another precision than its weight."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(…, hidden) → (…, vocab)."""
        return nn.functional.linear(x, self.weight) + self.bias  # in the wider precision, as in training


def add_head_bias(model: PreTrainedModel) -> PreTrainedModel:
    """Give the LM head a bias, zero at first, so that the output is unchanged; return the same model.

    Qwen2's head has none, and its weight is tied to the input embedding: the new head shares that very parameter,
    so it costs `vocab_size` numbers and leaves the tie as it was. Adding twice changes nothing.
    """
    head = model.get_output_embeddings()
    if head.bias is None:
        biased = BiasedHead(head.in_features, head.out_features, bias=True, device="meta")
        biased.weight = head.weight
        # It stays in float32 even over a bfloat16 weight, as LoRA does: AdamW's small steps would be rounded away.
        biased.bias = nn.Parameter(torch.zeros(head.out_features, dtype=torch.float32, device=head.weight.device))
        model.set_output_embeddings(biased)
    return model


def has_bfloat16(device: str) -> bool:
    """Whether matrix products in bfloat16 are the faster ones on a kind of device (``cpu``, ``cuda``)."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    features = torch.cpu.get_capabilities() if device == "cpu" else {}
    return bool(features.get("amx_bf16") or features.get("avx512_bf16"))


def mixed_precision(model: nn.Module) -> torch.autocast:
    """Context in which a float32 model's matrix products run in bfloat16, where the machine is faster at them."""
    device = next(model.parameters()).device.type
    return torch.autocast(device, torch.bfloat16, enabled=has_bfloat16(device))


def embedded_config(**changes: Any) -> Qwen2Config:  # of any of its fields, each with its own type
    """The architecture of the embedded base: Qwen2, 3.6 M parameters, grouped-query attention, tied embeddings."""
    settings = dict(
        vocab_size=256 + len(SPECIAL_TOKENS),
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        bos_token_id=256,
        eos_token_id=256,
        pad_token_id=256,
    )
    return Qwen2Config(**settings | changes)


def embedded_tokenizer() -> Qwen2Tokenizer:
    """Qwen2's own tokenizer class with the 256 bytes as vocabulary and no merges.

    The bytes stand in byte-level BPE order, as in Qwen2.5, so that digits and punctuation have the same ids there and
    here: ``0``…``9`` are 15…24, ``.`` 13, ``,`` 11, ``;`` 26, ``-`` 12.
    """
    # Byte-level BPE (GPT-2) numbers the printable bytes first; the others follow, shown as the characters from 256 on.
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    symbols = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    vocab = {symbol: index for index, symbol in enumerate([*symbols, *SPECIAL_TOKENS])}
    return Qwen2Tokenizer(
        vocab=vocab,
        merges=[],
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL_TOKENS[1:]),
    )


def fetch_base(name: str, *, weights: bool = True) -> Path:
    """The folder of a base (`paths.find_base`), fetched from the hub where it is not on this machine yet (`UserError`)."""
    folder = find_base(name, weights=weights)
    if folder is not None:
        return folder
    if not is_hub_name(name):
        raise UserError(
            f"{name}: no such folder; give 'embedded', a hub name such as Qwen/Qwen2.5-0.5B-Instruct, or a folder"
        )
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=hub_files(weights)))
    except Exception as error:  # the hub client raises many kinds
        if isinstance(error, GatedRepoError):
            remedy = "accept its licence on its page and 'hf auth login', or give a folder"
        elif isinstance(error, RepositoryNotFoundError):  # a private one looks the same
            remedy = "check the name, and 'hf auth login' if it is private"
        else:
            remedy = "connect and try again, or give a folder"
        raise UserError(
            f"{name}: not in the local cache and not fetched from the hub ({type(error).__name__}: {one_line(error)}); {remedy}"
        ) from error
