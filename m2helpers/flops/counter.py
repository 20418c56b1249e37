"""Matmul FLOPs as PyTorch's own counter measures them: the check of `m2helpers.flops`, and the bill of other models.

`torch.utils.flop_counter.FlopCounterMode` watches one forward pass and bills each matrix product (m×n)·(n×p) as
2·m·n·p, and nothing else. The model is built on the `meta` device from its config alone: no weights, no memory, no
arithmetic. Attention is *eager*: fused attention on a CPU is an operation the counter does not know and bills as zero.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ..files import UserError
from .architecture import within


def meta_model(config: PreTrainedConfig) -> PreTrainedModel:
    """Build a causal LM on the `meta` device from its transformers config, with eager attention, in eval mode."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


def own_flops(counter: FlopCounterMode) -> dict[str, int]:
    """FLOPs of each module's own products, its children's taken away.

    Parameters
    ----------
    counter : FlopCounterMode
        A counter that watched a forward pass of one root module.

    Returns
    -------
    dict of str to int
        Module path without the root's class name (`model.layers.0.self_attn`) to FLOPs, modules with none left out.
        The values add up to `counter.get_total_flops()`.
    """
    totals = {path: sum(ops.values()) for path, ops in counter.get_flop_counts().items() if path != "Global"}
    own = dict(totals)
    for path, flops in totals.items():
        parent = path.rpartition(".")[0]
        while parent and parent not in totals:  # a ModuleList is never called itself, so it has no line
            parent = parent.rpartition(".")[0]
        if parent:
            own[parent] -= flops
    return {path.partition(".")[2]: flops for path, flops in own.items() if flops}


def count_forward(config: PreTrainedConfig, batch_size: int, length: int, past: int = 0) -> tuple[str, dict[str, int]]:
    """Measure one forward pass of `length` new tokens a row after `past` cached ones.

    Parameters
    ----------
    config : PreTrainedConfig
        Config of any causal LM that transformers knows.
    batch_size, length, past : int
        Rows, new tokens a row, tokens a row already in the KV cache.

    Returns
    -------
    str
        Path of the LM head, which runs at every position.
    dict of str to int
        Module path to FLOPs, as `own_flops`.
    """
    model = _model(config)
    head = next(path for path, module in model.named_modules() if module is model.get_output_embeddings())
    with torch.no_grad(), torch.device("meta"):  # always with a cache: without one, some models ask for a mask's values
        cache = model(torch.zeros(batch_size, past, dtype=torch.long), use_cache=True).past_key_values if past else None
        with FlopCounterMode(display=False) as counter:
            model(torch.zeros(batch_size, length, dtype=torch.long), past_key_values=cache, use_cache=True)
    return head, own_flops(counter)


def forward_matmuls(
    config: PreTrainedConfig, batch_size: int, length: int, past: int, positions: int, vocabulary: int | None
) -> dict[str, int]:
    """`count_forward`'s products, the head's at so many positions a row and tokens of the vocabulary alone."""
    head, matmuls = count_forward(config, batch_size, length, past)
    tokens = within("vocabulary", vocabulary, config.vocab_size)
    matmuls[head] = matmuls[head] * positions * tokens // (length * config.vocab_size)
    return matmuls


def lora_matmuls(config: PreTrainedConfig, rows: int, lora_r: int, target_modules: Sequence[str]) -> dict[str, int]:
    """Module path to FLOPs of LoRA branches on `rows` tokens, from the shapes of the matrices they adapt; none at rank 0.

    Raises
    ------
    UserError
        If a target fits no module of the model.
    """
    shapes = _lora_shapes(config, target_modules) if lora_r else {}
    return {f"{path}.lora": 2 * rows * lora_r * sum(shape) for path, shape in shapes.items()}


def operations(matmuls: dict[str, int]) -> dict[str, dict[str, int]]:
    """Products by the module's own name, at 2·m·n·p: half of them multiplications, half additions."""
    counts: dict[str, dict[str, int]] = {}
    for path, flops in matmuls.items():
        component = counts.setdefault(path.rpartition(".")[2], {"multiply": 0, "add": 0})
        component["multiply"] += flops // 2
        component["add"] += flops // 2
    return counts


def count_parameters(config: PreTrainedConfig, lora_r: int, target_modules: Sequence[str]) -> tuple[int, int]:
    """Parameters of the model, a tied matrix once, and of its LoRA branches: r·(i + o) for a matrix i→o."""
    shapes = _lora_shapes(config, target_modules) if lora_r else {}
    return sum(p.numel() for p in _model(config).parameters()), lora_r * sum(map(sum, shapes.values()))


def _lora_shapes(config: PreTrainedConfig, target_modules: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Weight shapes of the matrices that LoRA would adapt: every module whose own name is in `target_modules`."""
    modules = {path: path.rpartition(".")[2] for path, _ in _model(config).named_modules()}
    for name in target_modules:
        if name not in modules.values():
            raise UserError(
                f"target module {name!r}: not in a {config.model_type} model; name one of its linear layers"
            )
    return {
        path: tuple(_model(config).get_parameter(f"{path}.weight").shape)
        for path, name in modules.items()
        if name in target_modules
    }


def _model(config: PreTrainedConfig) -> PreTrainedModel:
    text = json.dumps(config.to_dict(), default=str)
    return _cached_model(type(config), text)  # type: ignore[arg-type]  # mypy asks the class for its instances' hash


@lru_cache(maxsize=4)
def _cached_model(
    config_class: type[PreTrainedConfig], text: str
) -> PreTrainedModel:  # generation asks for the same model thrice a row
    return meta_model(config_class.from_dict(json.loads(text)))
