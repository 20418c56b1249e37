"""What four bits save and what they cost: bytes of weights, computed and measured, and how far the matrices are from their originals."""

from __future__ import annotations

from typing import TypedDict, cast

import pandas as pd
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..flops.account import count_parameters
from ..flops.counter import meta_model
from ..settings import InstructSettings
from .prices import Prices
from .quietly import bitsandbytes

BLOCK, NESTED_BLOCK = 64, 256  # weights that share a scale; scales that share one, with double quantisation


class Needs(TypedDict):
    """What tuning a base would take."""

    parameters: int
    quantised: int
    """Weights in the matrices of the layers: those that are kept in fewer bits."""
    trainable: int
    bytes: dict[str, int]
    """Of the weights, by the form they are kept in."""
    adapter_bytes: int
    """Of the adapter in float32, its gradient and AdamW's two moments."""
    epoch_flops: int


def weight_bytes(model: nn.Module) -> dict[str, int]:
    """Bytes of a model's weights by the form of its layers' matrices, computed from their shapes alone; a tied one counts once.

    Embedding, norms and biases stay in bfloat16 beside bfloat16, and in float32 beside all others, as training wants them.
    A block of `BLOCK` weights in NF4 has a scale in float32. With double quantisation the scale has one byte, and
    `NESTED_BLOCK` scales share a float32. int8 has a float32 for each row.
    """
    linear = {id(m.weight): m for name, m in model.named_modules() if isinstance(m, nn.Linear) and ".layers." in name}
    matrices = sum(m.weight.numel() for m in linear.values())
    rest = sum(p.numel() for p in model.parameters()) - matrices
    rows = sum(m.out_features for m in linear.values())
    blocks = [-(-m.weight.numel() // BLOCK) for m in linear.values()]
    nested = sum(n + 4 * -(-n // NESTED_BLOCK) + 4 for n in blocks)  # and one offset a matrix
    return {
        "float32": 4 * (matrices + rest),
        "bfloat16": 2 * (matrices + rest),
        "int8": matrices + 4 * rows + 4 * rest,
        "NF4": matrices // 2 + 4 * sum(blocks) + 4 * rest,
        "NF4, double": matrices // 2 + nested + 4 * rest,
    }


def measured_bytes(model: nn.Module) -> int:
    """Bytes that a loaded model's weights take, the scales of quantised ones among them."""
    total = 0
    for p in model.parameters():
        total += p.nbytes
        if (state := getattr(p, "quant_state", None)) is not None:
            scales = [state.absmax, state.offset, getattr(state.state2, "absmax", None)]
            total += sum(t.nbytes for t in scales if t is not None)
        elif (rows := getattr(p, "SCB", None)) is not None:
            total += rows.nbytes
    return total


def quantisation_errors(full: PreTrainedModel, four_bit: PreTrainedModel) -> pd.DataFrame:
    """How far a base's matrices in four bits are from their originals: ``layer``, ``matrix`` and ``error``, ‖W − Ŵ‖ / ‖W‖ (Frobenius)."""
    functional, rows = bitsandbytes().functional, []
    originals = dict(full.named_parameters())
    for name, p in four_bit.named_parameters():
        if hasattr(p, "quant_state"):
            whole = functional.dequantize_4bit(p.data, p.quant_state).float()
            original = originals[name].detach().float()
            parts = name.split(".")
            error = float(torch.linalg.norm(original - whole) / torch.linalg.norm(original))
            rows.append({"layer": int(parts[parts.index("layers") + 1]), "matrix": parts[-2], "error": error})
    return pd.DataFrame(rows)


def needs(config: PreTrainedConfig, settings: InstructSettings, rows: int, length: int) -> Needs:
    """What tuning a base would take, computed from its architecture on the meta device: nothing is loaded, nothing is run.

    Parameters
    ----------
    config : PreTrainedConfig
    settings : InstructSettings
    rows, length : int
        Of the data: how many rows, and tokens of each.
    """
    model = meta_model(config)
    parameters, trainable = count_parameters(config, settings.lora_r, settings.target_modules, head_bias=False)
    matrices = sum(m.weight.numel() for n, m in model.named_modules() if isinstance(m, nn.Linear) and ".layers." in n)
    prices = Prices(config, settings.adaptation, matrices * settings.four_bit)
    epoch = prices.epoch([length] * rows, [length], (settings.batch_size, settings.batch_size))
    return {
        "parameters": parameters,
        "quantised": matrices,
        "trainable": trainable,
        "bytes": weight_bytes(cast(nn.Module, model)),
        "adapter_bytes": 16 * trainable,
        "epoch_flops": epoch["train"].flops,
    }
