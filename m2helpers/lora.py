"""LoRA: a trained low-rank update beside each frozen weight matrix, and the trained bias of the LM head.

``y = W x + (alpha / r) · B A x`` with A (r × in) random and B (out × r) zero at first, so that training starts from the
base model's own output. Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022.

Adapters are kept in the layout of the `peft` package, the head bias among them under ``base_model.model.lm_head.bias``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from .engine.modelfiles import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from .files import UserError, atomic_path, read_json, write_json
from .settings import LoraSettings

PREFIX = "base_model.model."
HEAD_BIAS = "lm_head.bias"

# peft's config says how an update works, in options that grow with every version. Plain LoRA is the first four; the
# others here do not change how a trained update is applied (some have a switch of their own); an unknown one may.
_SETTINGS = ("r", "lora_alpha", "lora_dropout", "target_modules")
_WITHOUT_EFFECT = set(
    "auto_mapping base_model_name_or_path eva_config inference_mode megatron_core peft_version qalora_group_size revision "
    "task_type".split()
)
_PLAIN: dict[str, tuple[object, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, "gaussian", "orthogonal", "eva", "mica"),  # these leave the base's own weights alone
}


class CheapDropout(nn.Dropout):
    """Dropout whose mask, on a CPU, takes a quarter of the random numbers: one of 64 bits serves four entries.

    The rate is rounded to a multiple of 1/65,536.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Any shape to the same."""
        if not self.training or not self.p or x.device.type != "cpu":
            return super().forward(x)
        draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        dropped = draws.view(torch.int16)[: x.numel()].view(x.shape) < round(self.p * 2**16) - 2**15
        return x.masked_fill(dropped, 0) / (1 - self.p)


class LoraLinear(nn.Module):
    """A frozen linear layer with a low-rank update.

    Parameters
    ----------
    base : nn.Linear
        (out, in) weights; frozen here.
    settings : LoraSettings
    """

    def __init__(self, base: nn.Linear, settings: LoraSettings):
        super().__init__()
        rank, device = settings.lora_r, base.weight.device
        self.base = base.requires_grad_(False)
        # The update stays in float32 even over a bfloat16 base: AdamW's small steps would be rounded away.
        self.lora_A = nn.Linear(base.in_features, rank, bias=False, device=device, dtype=torch.float32)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False, device=device, dtype=torch.float32)
        self.dropout = CheapDropout(settings.lora_dropout)
        self.scaling = settings.lora_alpha / rank
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)
        self.train(base.training)  # a new module would drop out, in a model that is being evaluated
        self._unmerged: torch.Tensor | None = None  # the base's own weight while the update is merged into it

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(…, in) → (…, out)."""
        y = self.base(x)
        if self._unmerged is not None:
            return y
        kind = x.device.type
        if not (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)):
            x = x.to(self.lora_A.weight.dtype)  # autocast brings input and weight to one precision by itself
        update = self.lora_B(self.lora_A(self.dropout(x)))  # (…, rank) → (…, out)
        return y + (self.scaling * update).to(y.dtype)

    @torch.no_grad()
    def delta(self) -> torch.Tensor:
        """The update as one matrix, (out, in), float32."""
        return self.scaling * self.lora_B.weight @ self.lora_A.weight

    @torch.no_grad()
    def merge(self) -> None:
        """Add the update to the weight, so that it costs nothing; merging twice changes nothing more."""
        if self._unmerged is None:
            self._unmerged = self.base.weight.data
            self.base.weight.data = (self._unmerged.float() + self.delta()).to(self._unmerged.dtype)

    def unmerge(self) -> None:
        """Put the base's weight back, bit for bit."""
        if self._unmerged is not None:
            self.base.weight.data, self._unmerged = self._unmerged, None


def apply_lora(model: PreTrainedModel, settings: LoraSettings) -> PreTrainedModel:
    """Freeze a model, give its target layers LoRA updates, and leave the head bias trainable; return the same model.

    Raises
    ------
    UserError
        If the rank is negative, the model is adapted already, or a target names none of its linear layers.
    """
    if settings.lora_r < 0:
        raise UserError(f"lora_r {settings.lora_r}: give 0 (head bias alone) or more")
    if any(True for _ in lora_layers(model)):
        raise UserError("the model has LoRA updates already: load the base again")
    model.requires_grad_(False)
    if settings.lora_r:
        _check_targets(model, settings.target_modules)
        found = {
            name: module for name, module in model.named_modules() if name.rpartition(".")[2] in settings.target_modules
        }
        for name, module in found.items():
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, LoraLinear(module, settings))
    head = model.get_output_embeddings()
    if head.bias is not None:
        head.bias.requires_grad_(True)
    return model


def _check_targets(model: nn.Module, targets: Sequence[str]) -> None:
    """Refuse a target that names none of the linear layers in a model's blocks."""
    named = {name.rpartition(".")[2]: module for name, module in model.named_modules() if name != "lm_head"}
    linear = sorted(name for name, module in named.items() if isinstance(module, nn.Linear))
    for target in targets:
        if target not in linear:
            it_is = f" (it is a {type(named[target]).__name__})" if target in named else ""
            choice = f"choose from {', '.join(linear)}" if linear else "choose a base that has some, such as Qwen2.5"
            if not linear and "Conv1D" in {type(module).__name__ for module in named.values()}:
                it_is = ", only Conv1D"  # GPT-2's, whose weights lie the other way round
            raise UserError(f"target_modules {target!r}: the model has no such linear layer{it_is}; {choice}")


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoraLinear]]:
    """The adapted layers of a model, by name."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, LoraLinear))


def merge(model: nn.Module) -> nn.Module:
    """Merge every update into its weight (for fast inference); return the same model."""
    for _, layer in lora_layers(model):
        layer.merge()
    return model


def unmerge(model: nn.Module) -> nn.Module:
    """Take every update out again; the base's weights are back bit for bit."""
    for _, layer in lora_layers(model):
        layer.unmerge()
    return model


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What training changes, by name: LoRA matrices and the head bias, nothing else."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def parameter_report(model: nn.Module) -> dict[str, int]:
    """How many parameters there are: ``base``, ``lora``, ``head_bias``, ``trainable``; tied ones counted once."""
    counts = {"base": 0, "lora": 0, "head_bias": 0, "trainable": 0}
    for name, p in model.named_parameters():
        kind = "lora" if ".lora_" in name else "head_bias" if name == HEAD_BIAS else "base"
        counts[kind] += p.numel()
        counts["trainable"] += p.numel() * p.requires_grad
    return counts


def save_adapter(model: nn.Module, folder: Path, settings: LoraSettings, base_name: str, base_sha256: str) -> None:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors`` as `peft` reads them.

    The saved keys are exactly the LoRA matrices and the head bias. The base's hash is in the file's metadata.
    """
    tensors = {PREFIX + name: p.detach().contiguous().cpu() for name, p in trainable_parameters(model).items()}
    with atomic_path(Path(folder) / ADAPTER_WEIGHTS) as temporary:
        # One entry only: safetensors writes several in an order that changes, and the same run would give other bytes.
        save_file(tensors, temporary, metadata={"base_sha256": base_sha256})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": settings.lora_r,
        "lora_alpha": settings.lora_alpha,
        "lora_dropout": settings.lora_dropout,
        "target_modules": list(settings.target_modules),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    write_json(Path(folder) / ADAPTER_CONFIG, config)


def load_adapter(model: PreTrainedModel, folder: Path, base_sha256: str | None = None) -> LoraSettings:
    """Adapt a model as a saved adapter says and load its weights; return its settings.

    Parameters
    ----------
    model : PreTrainedModel
        A base with head bias, as `models.load_base` gives it.
    folder : Path
        Holds the adapter's two files, written by `save_adapter` or by `peft`.
    base_sha256 : str, optional
        The base's hash: an adapter made for another base is refused.

    Raises
    ------
    UserError
        If a file is missing or damaged, its update is not plain LoRA, the adapter belongs to another base, or its keys or
        shapes do not fit.
    """
    folder = Path(folder)
    settings, path = adapter_settings(folder), folder / ADAPTER_WEIGHTS
    made_for = _metadata(path).get("base_sha256")
    if base_sha256 and made_for and made_for != base_sha256:
        raise UserError(
            f"{folder}: this adapter was trained on base {made_for[:12]}…, not on the one loaded ({base_sha256[:12]}…); "
            f"load {_read_config(folder)['base_model_name_or_path']!r} as it was then"
        )
    _check_rank(path, settings.lora_r)  # before memory is taken for it
    settings = replace(settings, target_modules=_short_names(model, settings.target_modules, folder))
    try:
        apply_lora(model, settings)
    except UserError as error:
        what = str(error).partition("; choose")[0]
        raise UserError(f"{folder}: {what}; load this adapter with peft, on the base it was trained on") from None
    load_weights(trainable_parameters(model), path)
    return settings


def adapter_settings(folder: Path) -> LoraSettings:
    """What a saved adapter says of its update.

    Raises
    ------
    UserError
        If its config is missing or damaged, or has an option that this module does not know to leave plain LoRA as it is.
    """
    config, path = _read_config(folder), Path(folder) / ADAPTER_CONFIG
    for option in ("peft_type", *sorted(config)):
        value = config.get(option)
        off = value is None or value is False or value in ("", [], {})  # 0 is a value: a layer has that number
        if off or option in _SETTINGS or option in _WITHOUT_EFFECT or value in _PLAIN.get(option, ()):
            continue
        named = f"{option} {value!r}" if isinstance(value, str) else option
        raise UserError(f"{path}: {named} is not supported here; load this adapter with peft")
    if isinstance(config.get("target_modules"), str):
        raise UserError(
            f"{path}: target_modules {config['target_modules']!r} is a pattern; list the layers' names, "
            "or load this adapter with peft"
        )
    try:
        rank, alpha, dropout, targets = (config[option] for option in _SETTINGS)
        if not (0 <= float(dropout) < 1 and math.isfinite(float(alpha))):
            raise ValueError(f"lora_dropout {dropout}, lora_alpha {alpha}")
        return LoraSettings(int(rank), float(alpha), float(dropout), tuple(sorted(targets)))
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{path}: not a LoRA adapter's settings ({error}); train or copy the run again") from None


def _check_rank(path: Path, rank: int) -> None:
    """Refuse weights of another rank than their config's (`UserError`)."""
    with safe_open(path, framework="pt") as stream:
        shapes = {name: stream.get_slice(name).get_shape() for name in stream.keys() if ".lora_A." in name}  # noqa: SIM118
    for name, shape in shapes.items():
        if shape[:1] != [rank]:
            raise UserError(
                f"{path}: {name} has shape {tuple(shape)}, and {ADAPTER_CONFIG} says r {rank}; train or copy the run again"
            )
    if not shapes and rank > path.stat().st_size:
        raise UserError(f"{path}: holds no update of rank {rank}; train or copy the run again")


def _short_names(model: nn.Module, targets: Sequence[str], folder: Path) -> tuple[str, ...]:
    """Targets by the last part of their names: `peft` takes more of it too, as in ``self_attn.q_proj``, up to all of it."""
    names = [name for name, _ in model.named_modules()]
    meant = {name for name in names if any(f".{name}".endswith(f".{target}") for target in targets)}
    short = {name.rpartition(".")[2] for name in meant}
    if meant != {name for name in names if name.rpartition(".")[2] in short}:
        raise UserError(
            f"{folder / ADAPTER_CONFIG}: target_modules is not supported here where it leaves out layers of a name; "
            "load this adapter with peft"
        )
    return tuple(sorted(short)) or tuple(targets)


def _read_config(folder: Path) -> dict[str, Any]:  # what JSON holds
    config = read_json(Path(folder) / ADAPTER_CONFIG)
    if not isinstance(config, dict):
        raise UserError(f"{Path(folder) / ADAPTER_CONFIG}: not a LoRA adapter's settings; train or copy the run again")
    return config


def load_weights(parameters: Mapping[str, torch.Tensor], path: Path) -> None:
    """Copy an adapter's weights into tensors of the same names (`trainable_parameters`).

    Raises
    ------
    UserError
        If the file is missing or damaged, or its keys or shapes are not those of the tensors.
    """
    _metadata(path)  # a damaged file is refused here
    tensors = {name.removeprefix(PREFIX): tensor for name, tensor in load_file(path).items()}
    if strange := set(tensors) - set(parameters):
        name = min(strange)
        remedy = "load the base it was trained on" if ".lora_" in name else "load this adapter with peft"
        raise UserError(f"{path}: holds {name!r}, which the base has no place for; {remedy}")
    if missing := set(parameters) - set(tensors) - {HEAD_BIAS}:  # peft trains without the bias, which then stays zero
        raise UserError(f"{path}: lacks {sorted(missing)[0]!r}; the file is not whole, train or copy the run again")
    for name, tensor in tensors.items():
        if parameters[name].shape != tensor.shape:
            raise UserError(
                f"{path}: {name} has shape {tuple(tensor.shape)}, the base needs {tuple(parameters[name].shape)}; "
                "load the base it was trained on"
            )
        parameters[name].data.copy_(tensor)


def _metadata(path: Path) -> dict[str, str]:
    try:
        with safe_open(path, framework="pt") as stream:
            return stream.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: adapter weights cannot be read ({error}); train or copy the run again") from None
