"""The true cost of a LoRA backward pass, beside which the course's "backward = 2 × forward" is a round figure.

A product Y = X·W costs the same again for the gradient of X, where X depends on something trainable, and once more for
that of W, where W is trainable. Frozen matrices have no weight gradient. Below the first adapted matrix nothing depends
on anything trainable, so there is no input gradient either: in layer 0, with q_proj and v_proj adapted, that spares the
keys and every gradient of the layer's input. The head bias needs no product. Matrix products only, at 2·m·n·p each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypedDict, Unpack

from ..files import UserError
from .account import forward_account
from .architecture import Size, check_sizes, layer_matrices, lora_targets, other_architecture, within

if TYPE_CHECKING:
    from .architecture import Config


class _Options(TypedDict, total=False):
    target_modules: Sequence[str]
    vocabulary: int | None
    scored_positions: int | None


def lora_backward_matmuls(
    config: Config,
    batch_size: int,
    length: int,
    *,
    lora_r: int,
    target_modules: Sequence[str] = ("q_proj", "v_proj"),
    vocabulary: int | None = None,
    scored_positions: int | None = None,
) -> dict[str, int]:
    """Matrix products of one LoRA backward pass, by module.

    Parameters
    ----------
    config, batch_size, length, lora_r, target_modules, vocabulary, scored_positions
        As in `m2helpers.flops.forward_account`, the training step's own.

    Returns
    -------
    dict of str to int
        Module path to FLOPs, as `Account.matmuls`, modules that have no product left out.

    Raises
    ------
    UserError
        For an architecture other than Qwen2, and as `forward_account`.
    """
    if (other := other_architecture(config)) is not None:
        raise UserError(f"{other.model_type}: the true backward cost is derived for qwen2 only; use a Qwen2 config")
    check_sizes(batch_size, length, lora_r)
    positions = within("scored_positions", scored_positions, length)
    size = Size.of(config)
    matrices = layer_matrices(size, size.groups)
    targets = lora_targets(matrices, lora_r, target_modules)
    rows = batch_size * length
    product = 2 * batch_size * size.heads * length * length * size.head_dim  # scores, or values: the same size
    matmuls: dict[str, int] = {}

    def linear(layer: int, name: str, wanted: bool) -> bool:
        """Bill one matrix whose input's gradient is `wanted` or not; say whether its output's gradient is."""
        path, i, o = matrices[name]
        path = f"model.layers.{layer}.{path}"
        matmuls[path] = wanted * 2 * rows * i * o
        if name in targets:
            matmuls[f"{path}.lora_A"] = (1 + wanted) * 2 * rows * i * lora_r
            matmuls[f"{path}.lora_B"] = 2 * 2 * rows * lora_r * o
        return wanted or name in targets

    x = False  # does the layer's input depend on a trainable parameter? embeddings do not
    for layer in range(size.layers):
        q, k, v = (linear(layer, name, x) for name in ("q_proj", "k_proj", "v_proj"))
        weights = q or k
        matmuls[f"model.layers.{layer}.self_attn"] = (q + k + weights + v) * product
        x = linear(layer, "o_proj", weights or v) or x
        gate, up = linear(layer, "gate_proj", x), linear(layer, "up_proj", x)
        x = linear(layer, "down_proj", gate or up) or x
    matmuls["lm_head"] = x * 2 * batch_size * positions * size.hidden * within("vocabulary", vocabulary, size.vocab)
    return {path: flops for path, flops in matmuls.items() if flops}


def lora_step_flops(config: Config, batch_size: int, length: int, *, lora_r: int, **options: Unpack[_Options]) -> int:
    """FLOPs of the matrix products that one LoRA training step needs, forward and backward (options as in `lora_backward_matmuls`)."""
    forward = forward_account(config, batch_size, length, lora_r=lora_r, **options)
    return sum(forward.matmuls.values()) + lora_backward_flops(config, batch_size, length, lora_r=lora_r, **options)


def lora_backward_flops(
    config: Config, batch_size: int, length: int, *, lora_r: int, **options: Unpack[_Options]
) -> int:
    """FLOPs of the matrix products of one LoRA backward pass (options as in `lora_backward_matmuls`)."""
    return sum(lora_backward_matmuls(config, batch_size, length, lora_r=lora_r, **options).values())
