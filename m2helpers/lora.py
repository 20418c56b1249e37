"""LoRA: a trained low-rank update beside each frozen weight matrix, and the trained bias of the LM head.

``y = W x + (alpha / r) · B A x`` with A (r × in) random and B (out × r) zero at first, so that training starts from the
base model's own output. Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022.

Adapters are kept in the layout of the `peft` package, the head bias among them under ``base_model.model.lm_head.bias``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from .files import UserError, atomic_path, read_json, write_json
from .settings import LoraSettings

PREFIX = "base_model.model."
CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
HEAD_BIAS = "lm_head.bias"


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


def apply_lora(model: nn.Module, settings: LoraSettings) -> nn.Module:
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
        found = {
            name: module for name, module in model.named_modules() if name.rpartition(".")[2] in settings.target_modules
        }
        linear = sorted(
            {n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}
        )
        for target in settings.target_modules:
            if target not in linear:
                raise UserError(
                    f"target_modules {target!r}: the model has no such linear layer; choose from {', '.join(linear)}"
                )
        for name, module in found.items():
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, LoraLinear(module, settings))
    head = model.get_output_embeddings()
    if head.bias is not None:
        head.bias.requires_grad_(True)
    return model


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
    with atomic_path(Path(folder) / WEIGHTS_NAME) as temporary:
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
    write_json(Path(folder) / CONFIG_NAME, config)


def load_adapter(model: nn.Module, folder: Path, base_sha256: str | None = None) -> LoraSettings:
    """Adapt a model as a saved adapter says and load its weights; return its settings.

    Parameters
    ----------
    model : nn.Module
        A base with head bias, as `models.load_base` gives it.
    folder : Path
        Holds the adapter's two files, written by `save_adapter` or by `peft`.
    base_sha256 : str, optional
        The base's hash: an adapter made for another base is refused.

    Raises
    ------
    UserError
        If a file is missing or damaged, the adapter belongs to another base, or its keys or shapes do not fit.
    """
    folder = Path(folder)
    config, path = read_json(folder / CONFIG_NAME), folder / WEIGHTS_NAME
    try:
        settings = LoraSettings(
            config["r"], config["lora_alpha"], config["lora_dropout"], tuple(sorted(config["target_modules"]))
        )
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{folder / CONFIG_NAME}: not a LoRA adapter's settings ({error}); train or copy the run again"
        ) from None
    if isinstance(targets := config["target_modules"], str):
        raise UserError(f"{folder / CONFIG_NAME}: target_modules {targets!r} is a pattern; list the layers' names")
    # peft's, and invisible in the weights: they change the scaling, the base's own weights, or when the update applies.
    strange = [option for option in ("use_rslora", "alpha_pattern", "alora_invocation_tokens") if config.get(option)]
    if (start := config.get("init_lora_weights")) not in (None, True, False, "gaussian", "orthogonal", "eva"):
        strange.append(f"init_lora_weights {start!r}")
    if strange:
        raise UserError(f"{folder / CONFIG_NAME}: {strange[0]} is not supported here; load this adapter with peft")
    made_for = _metadata(path).get("base_sha256")
    if base_sha256 and made_for and made_for != base_sha256:
        raise UserError(
            f"{folder}: this adapter was trained on base {made_for[:12]}…, not on the one loaded ({base_sha256[:12]}…); "
            f"load {config['base_model_name_or_path']!r} as it was then"
        )
    load_weights(trainable_parameters(apply_lora(model, settings)), path)
    return settings


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
        raise UserError(
            f"{path}: holds {sorted(strange)[0]!r}, which the base has no place for; load the base it was trained on"
        )
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
