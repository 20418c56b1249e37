"""The sizes of a Qwen2 model read from its config: matrices, LoRA targets, parameters. No torch, no transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from ..files import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    Config = Mapping[str, Any] | PreTrainedConfig
    """An architecture: a transformers config, or a mapping of a Qwen2 config's fields (numbers, names, flags: `Any`)."""

# Qwen/Qwen2.5-0.5B-Instruct, from its config.json: heads 896 / 14 = 64 wide; q, k, v have a bias, o none
QWEN_05B: dict[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}
# Qwen/Qwen2.5-1.5B-Instruct, from its config.json: what differs
QWEN_15B: dict[str, Any] = QWEN_05B | {
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
}
# Qwen/Qwen2.5-7B-Instruct, from its config.json: what differs
QWEN_7B: dict[str, Any] = QWEN_05B | {
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
}
QWEN_05B_DTYPE = "bfloat16"  # of its published weights; not a size, so a model built from QWEN_05B is float32


@dataclass(frozen=True)
class Size:
    """The numbers of a Qwen2 config that decide its cost."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    groups: int
    """key-value heads"""
    head_dim: int
    vocab: int
    tied: bool
    """whether the LM head is the embedding matrix"""

    @classmethod
    def of(cls, config: Config) -> Size:
        """Read a transformers `Qwen2Config`, or a mapping of its fields such as `QWEN_05B`.

        Raises
        ------
        UserError
            If the activation is not SiLU.
        """
        fields = SimpleNamespace(**config) if isinstance(config, Mapping) else config
        if (activation := getattr(fields, "hidden_act", "silu")) != "silu":
            raise UserError(
                f"hidden_act {activation!r}: the account is derived for 'silu', which every Qwen2 model uses"
            )
        heads = fields.num_attention_heads
        return cls(
            hidden=fields.hidden_size,
            intermediate=fields.intermediate_size,
            layers=fields.num_hidden_layers,
            heads=heads,
            groups=getattr(fields, "num_key_value_heads", None) or heads,
            head_dim=getattr(fields, "head_dim", None) or fields.hidden_size // heads,
            vocab=fields.vocab_size,
            tied=fields.tie_word_embeddings,
        )


def other_architecture(config: Config) -> PreTrainedConfig | None:
    """The config of an architecture other than Qwen2, which is counted and not derived; None for Qwen2's."""
    if isinstance(config, Mapping) or getattr(config, "model_type", "qwen2") == "qwen2":
        return None
    return config


def is_qwen2(config: Config) -> bool:
    """Whether the config is Qwen2's; a mapping of fields is taken for one."""
    return other_architecture(config) is None


def layer_matrices(size: Size, groups: int) -> dict[str, tuple[str, int, int]]:
    """Matrices of one decoder layer with `groups` key-value heads: name → (path in the layer, inputs, outputs)."""
    queries, keys = size.heads * size.head_dim, groups * size.head_dim
    return {
        "q_proj": ("self_attn.q_proj", size.hidden, queries),
        "k_proj": ("self_attn.k_proj", size.hidden, keys),
        "v_proj": ("self_attn.v_proj", size.hidden, keys),
        "o_proj": ("self_attn.o_proj", queries, size.hidden),
        "gate_proj": ("mlp.gate_proj", size.hidden, size.intermediate),
        "up_proj": ("mlp.up_proj", size.hidden, size.intermediate),
        "down_proj": ("mlp.down_proj", size.intermediate, size.hidden),
    }


def lora_targets(matrices: Mapping[str, object], lora_r: int, target_modules: Sequence[str]) -> list[str]:
    """Names of the matrices with a LoRA branch, each once and in the layer's order; none at rank 0.

    Raises
    ------
    UserError
        If a target is not a matrix of the layer.
    """
    for name in target_modules:
        if name not in matrices:
            raise UserError(f"target module {name!r}: not in a Qwen2 layer; choose from {', '.join(matrices)}")
    return [name for name in matrices if lora_r and name in target_modules]


def count_qwen2_parameters(config: Config, lora_r: int, target_modules: Sequence[str]) -> tuple[int, int]:
    """Parameters of the base model, a tied matrix once, and of its LoRA branches: r·(i + o) for a matrix i→o."""
    size = Size.of(config)
    matrices = layer_matrices(size, size.groups)
    layer = sum(i * o for _, i, o in matrices.values()) + 2 * size.hidden  # and two norms
    layer += sum(matrices[name][2] for name in ("q_proj", "k_proj", "v_proj"))  # biases
    base = size.layers * layer + size.hidden + (1 if size.tied else 2) * size.vocab * size.hidden
    adapted = sum(sum(matrices[name][1:]) for name in lora_targets(matrices, lora_r, target_modules))
    return base, size.layers * lora_r * adapted


def check_sizes(batch_size: int, length: int, lora_r: int, past: int = 0) -> None:
    """Refuse a size that no pass can have.

    Raises
    ------
    UserError
        If a batch size or a length is below 1, or a rank or a cached length below 0.
    """
    for name, value, least in (
        ("batch_size", batch_size, 1),
        ("length", length, 1),
        ("lora_r", lora_r, 0),
        ("past", past, 0),
    ):
        if value < least:
            raise UserError(f"{name} {value}: must be at least {least}")


def within(name: str, value: int | None, most: int) -> int:
    """`value`, or `most` where there is none; a value outside 1…`most` is a `UserError`."""
    if value is None:
        return most
    if not 1 <= value <= most:
        raise UserError(f"{name} {value}: must be between 1 and {most}")
    return value
