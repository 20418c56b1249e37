"""QLoRA: a base whose weight matrices are kept in four bits (NF4), and LoRA in full precision over it.

Source: Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", NeurIPS 2023. Each block of 64 weights is divided by its
largest magnitude and every quotient replaced by the nearest of 16 values, the quantiles of a normal distribution. A
product works on the matrix put back together for it, so four bits save memory and not time.

The package is `bitsandbytes`, an extra of this one.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection
from typing import Any, cast

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from ..models import Base, choose_device, has_bfloat16, load_base
from ..settings import InstructSettings
from .quietly import bitsandbytes


def compute_dtype(device: str) -> torch.dtype:
    """What matrix products run in: float16 on CUDA, bfloat16 where a CPU is faster at it, else float32."""
    if device == "cuda":
        return torch.float16
    return torch.bfloat16 if has_bfloat16(device) else torch.float32


def four_bits(double_quant: bool = False) -> BitsAndBytesConfig:
    """NF4, with products in the precision that suits the device (`compute_dtype`).

    Parameters
    ----------
    double_quant : bool
        Keep the blocks' scales in eight bits as well: 0.37 bits a weight less.
    """
    bitsandbytes()
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=compute_dtype(choose_device()),
        bnb_4bit_use_double_quant=double_quant,
    )


def load_for_tuning(name: str | None, settings: InstructSettings) -> Base:
    """A base for QLoRA, or in full precision where the settings want that (see `models.load_base` for its name)."""
    quantised = four_bits(settings.double_quant) if settings.four_bit else None
    base = load_base(name, head_bias=False, quantised=quantised)
    for module in base.model.modules():
        # On CPUs with bfloat16 a layer would put its weights into another order as soon as it is evaluated, one that has no
        # backward pass: a training step after a validation would then fail.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            cast(Any, module).support_avx512bf16_for_cpu = False
    return base


def add_adapter(model: PreTrainedModel, settings: InstructSettings, used: Collection[int] = ()) -> PreTrainedModel:
    """Freeze a base and put `peft`'s LoRA over it, drawn with the settings' seed; everything else is as it was.

    Parameters
    ----------
    model : PreTrainedModel
    settings : InstructSettings
    used : collection of int
        Tokens of the training rows, whose embeddings are trained as well with `train_tokens`.

    Returns
    -------
    peft.PeftModel
        With the base inside; typed as the model that it behaves as.
    """
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    if settings.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    lora = LoraConfig(
        r=settings.lora_r,
        lora_alpha=cast(int, settings.lora_alpha),  # any number will do
        lora_dropout=settings.lora_dropout,
        bias="none",
        task_type="CAUSAL_LM",
        target_modules=list(settings.target_modules),
        trainable_token_indices=sorted(used) if settings.train_tokens else None,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of transformers, about what peft calls there
        if settings.four_bit:
            prepare_model_for_kbit_training(
                model, use_gradient_checkpointing=False
            )  # norms, embedding, head in float32
        torch.manual_seed(settings.seed)
        return cast(PreTrainedModel, get_peft_model(model, lora))


def four_bit_weights(model: nn.Module) -> int:
    """How many weights of a model are kept in four bits: each is put back once a pass, at one multiplication."""
    return sum(p.quant_state.shape.numel() for p in model.parameters() if hasattr(p, "quant_state"))
