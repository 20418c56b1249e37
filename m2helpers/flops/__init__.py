"""The FLOP account: what every operation of a pass costs, from the architecture alone, and the counters it is held against."""

from .account import (
    CAP,
    CONVENTIONS,
    COST,
    Account,
    count_parameters,
    flops_json,
    forward_account,
    generation_flops,
    training_flops,
)
from .architecture import QWEN_05B, QWEN_7B, QWEN_15B
from .backward import lora_backward_flops, lora_backward_matmuls

__all__ = [
    "CAP",
    "CONVENTIONS",
    "COST",
    "QWEN_05B",
    "QWEN_7B",
    "QWEN_15B",
    "Account",
    "count_parameters",
    "flops_json",
    "forward_account",
    "generation_flops",
    "lora_backward_flops",
    "lora_backward_matmuls",
    "training_flops",
]
