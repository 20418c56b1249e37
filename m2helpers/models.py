"""Base models: the embedded one this project ships, or any causal language model by hub name or local folder.

Both go the same way: a folder in hub format is found (or fetched), read, and given a trainable LM-head bias.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
import psutil
import torch
import transformers
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2Tokenizer,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .files import UserError, sha256_files
from .paths import find_base, hub_files, is_hub_name, short_name, weight_files
from .settings import default_model

LARGE = 2**28  # bytes of weights; from there on, precision is a matter of time and memory
transformers.utils.logging.disable_progress_bar()  # it would stay behind in notebooks
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


@dataclass(frozen=True)
class Base:
    """A base model ready to use."""

    model: PreTrainedModel
    tokenizer: object
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
    def pad_id(self) -> int:
        """The token that fills the left of a batch; its value does not matter, because it is masked."""
        return self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0


def load_base(name: str | None = None, *, head_bias: bool = True, dtype: str | None = None) -> Base:
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

    Raises
    ------
    UserError
        If the model cannot be found or fetched, is not a causal language model, has no safetensors weights, or needs
        more memory than is free.
    """
    name = name or default_model()
    folder = fetch_base(name)
    weights = weight_files(folder)
    if not (folder / "config.json").is_file() or not weights:
        missing = "config.json" if weights else "model*.safetensors weights"
        raise UserError(f"{name}: no {missing} in {folder}; give a folder in hub format, as save_pretrained writes it")
    device = choose_device()
    stored = sum(path.stat().st_size for path in weights)
    dtype = (
        dtype or os.environ.get("M2_DTYPE") or ("bfloat16" if stored > LARGE and has_bfloat16(device) else "float32")
    )
    if dtype not in ("float32", "bfloat16"):
        raise UserError(f"dtype {dtype!r}: choose float32 or bfloat16")
    try:
        config = AutoConfig.from_pretrained(folder)
        architectures = config.architectures or [""]
        if architectures[0] not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
            raise UserError(
                f"{name}: {architectures[0] or 'an unnamed architecture'} is not a causal language model; choose one that generates text"
            )
        needed = stored * getattr(torch, dtype).itemsize // (config.dtype or torch.float32).itemsize
        _check_memory(name, needed, device)
        model, report = AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype), use_safetensors=True, output_loading_info=True
        )
        if report["missing_keys"]:  # transformers would draw them at random and go on
            raise ValueError(f"the weights lack {min(report['missing_keys'])}")
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, KeyError, ValueError, RuntimeError, SafetensorError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{name}: cannot be loaded from {folder} ({_first_line(error)}); fetch or copy the model again"
        ) from error
    if head_bias:
        add_head_bias(model)
    # Without an instruct model's sampling flags and repetition penalty, which are for chat: digits repeat.
    kept = model.generation_config
    ends = dict(eos_token_id=kept.eos_token_id, pad_token_id=kept.pad_token_id, bos_token_id=kept.bos_token_id)
    model.generation_config = GenerationConfig(do_sample=False, **ends)
    return Base(model.to(device).eval(), tokenizer, name, sha256_files(weights))


def choose_device() -> str:
    """The first of CUDA, MPS and CPU that there is, or what ``M2_DEVICE`` names (`UserError` if it is not there)."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    found = [device for device, available in there.items() if available]
    asked = os.environ.get("M2_DEVICE") or found[0]
    if asked not in found:
        raise UserError(f"M2_DEVICE {asked!r}: this machine has {', '.join(found)}")
    return asked


def _check_memory(name: str, needed: int, device: str) -> None:
    free = psutil.virtual_memory().available  # weights are read there first, wherever they go
    if device == "cuda":
        free = min(free, torch.cuda.mem_get_info()[0])
    if needed > free:
        raise UserError(
            f"{name}: its weights need {needed / 1e9:.1f} GB of memory and {free / 1e9:.1f} GB are free; "
            "close other programs, or choose a smaller base"
        )


def load_config(name: str):
    """The configuration of a base, without its weights (see `load_base` for names and errors)."""
    folder = fetch_base(name, weights=False)
    try:
        return AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{name}: no usable config.json in {folder} ({_first_line(error)}); give a folder in hub format"
        ) from error


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


def embedded_config(**changes) -> Qwen2Config:
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
    special = dict(
        eos_token="<|endoftext|>", pad_token="<|endoftext|>", additional_special_tokens=list(SPECIAL_TOKENS[1:])
    )
    return Qwen2Tokenizer(vocab=vocab, merges=[], **special)


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
            f"{name}: not in the local cache and not fetched from the hub ({type(error).__name__}: {_first_line(error)}); {remedy}"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
