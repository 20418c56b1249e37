"""The FLOP account of a Qwen2 causal language model: every operation of a forward pass, from its config alone.

Prices. Add, subtract, negate, multiply, divide, ReLU, abs cost 1; exp, log, sin, cos, sqrt cost 10. A product
(m×n)·(n×p) is m·n·p multiplications and m·(n−1)·p additions, m·p·(2n−1) in all. Everything below is a count of these.

Sizes. h hidden, f intermediate, N layers, H query heads, G key-value heads, d head dimension, V scored tokens of the
vocabulary, r LoRA rank. B rows of L new tokens after P cached ones: R = B·L tokens run, each seeing K = P + L keys.
S = B·(scored positions a row) is where the LM head runs. "exact" takes G as it is; "course" sets G = H.

Once a pass::

    embedding         a look-up                                               0
    rmsnorm (last)    x²: h mul; mean: h−1 add, 1 div; +ε: 1 add; 1/√: 1 sqrt, 1 div;
                      x·(1/√): h mul; ·weight: h mul                          R·(4h + 12)
    lm_head           (S×h)·(h×V), tied or not                                S·V·(2h−1)
    head bias         one add a logit                                         S·V
    loss              training and validation only, cross-entropy: minus the maximum V, exp V, sum V−1, 1 log,
                      minus that log V, 1 negate; mean: S−1 add, 1 div        S·(13V + 10) + S

Each of N layers::

    rmsnorm           twice                                                   2R·(4h + 12)
    q_proj            (R×h)·(h×Hd), and a bias                                R·Hd·(2h−1) + R·Hd
    k_proj, v_proj    (R×h)·(h×Gd), and a bias, each                          R·Gd·(2h−1) + R·Gd
    rope              on q and k, an entry: ·cos, ·sin, one add, half a negate; computing cos and sin is free
                                                                              3.5·R·(H+G)·d
    attention scores  BH products (L×d)·(d×K); G shared heads are still H products
                                                                              BHLK·(2d−1)
    scale and mask    ·1/√d, then the mask is added: no causal halving        2·BHLK
    softmax           minus the maximum K, exp K, sum K−1, divide K, a row    BHL·(13K − 1)
    attention values  BH products (L×K)·(K×d)                                 BHLd·(2K−1)
    o_proj            (R×Hd)·(Hd×h), no bias                                  R·h·(2Hd−1)
    gate_proj, up_proj   (R×h)·(h×f), each                                    R·f·(2h−1)
    swiglu            x/(1+exp(−x)): negate, exp, add, div; times up: mul     14·R·f
    down_proj         (R×f)·(f×h)                                             R·h·(2f−1)
    residual          two adds an entry                                       2·R·h
    lora              for each target i→o: x·A (R×i)·(i×r), ·B (R×r)·(r×o), times α/r, added to the output
                                                                              R·r·(2i−1) + R·o·(2r−1) + 2·R·o

A training step is three forward passes (the course's "backward = 2 × forward"). A merged adapter is `lora_r=0`.

Left out, or zero: tokenising, indexing, copying key-value heads, the cache, computing positions and the mask, maxima
and other comparisons (greedy choice), dropout, type casts, the optimizer, gradient clipping, the softmax of sampling.
Padding is billed like any token. Sliding-window layers are billed as full attention.

The true cost of a LoRA backward pass is in `m2helpers.flops.backward`, published accounts in `m2helpers.flops.published`.
Other architectures are not derived here: they get the matrix products that `FlopCounterMode` measures, at 2·m·n·p,
and their account says so in `convention`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..files import UserError
from .architecture import (
    Size,
    check_sizes,
    count_qwen2_parameters,
    is_qwen2,
    layer_matrices,
    lora_targets,
    within,
)

CAP = 10**17  # FLOPs for all experiments together
CONVENTIONS = ("exact", "course")
COST = {"add": 1, "subtract": 1, "negate": 1, "multiply": 1, "divide": 1, "relu": 1, "abs": 1} | dict.fromkeys(
    ("exp", "log", "sin", "cos", "sqrt"), 10
)


@dataclass(frozen=True)
class Account:
    """What one forward pass costs."""

    operations: dict[str, dict[str, int]]
    """component → primitive → how many"""
    matmuls: dict[str, int]
    """module path (`model.layers.0.self_attn.q_proj`) → 2·m·n·p of its products, the convention of `FlopCounterMode`"""
    convention: str
    """`exact`, `course`, or `FlopCounterMode` (matrix products only) for an architecture other than Qwen2"""
    parameters: int
    """of the base model, a tied matrix once"""
    trainable: int
    """LoRA matrices and head bias"""

    @property
    def components(self) -> dict[str, int]:
        """Component → FLOPs; they add up to `forward`."""
        return {name: sum(COST[p] * n for p, n in counts.items()) for name, counts in self.operations.items()}

    @property
    def primitives(self) -> dict[str, int]:
        """Primitive → FLOPs; they add up to `forward`."""
        totals: dict[str, int] = {}
        for counts in self.operations.values():
            for primitive, n in counts.items():
                totals[primitive] = totals.get(primitive, 0) + COST[primitive] * n
        return totals

    @property
    def forward(self) -> int:
        """FLOPs of the forward pass."""
        return sum(self.components.values())

    @property
    def training(self) -> int:
        """FLOPs of a training step by the course's rule: forward, and a backward of twice that."""
        return 3 * self.forward

    @property
    def blocks(self) -> int:
        """FLOPs of the layers without the last norm, the head and the loss: what activation checkpointing computes again."""
        layers = len({path.split(".")[2] for path in self.matmuls if path.startswith("model.layers.")})
        components = self.components
        norm = components.get("rmsnorm", 0) // (2 * layers + 1) if layers else 0
        return self.forward - norm - sum(components.get(name, 0) for name in ("lm_head", "head bias", "loss"))


def forward_account(
    config: object,
    batch_size: int,
    length: int,
    *,
    lora_r: int = 0,
    target_modules: Sequence[str] = ("q_proj", "v_proj"),
    head_bias: bool = True,
    convention: str = "exact",
    vocabulary: int | None = None,
    past: int = 0,
    scored_positions: int | None = None,
    loss: bool = False,
) -> Account:
    """Account for one forward pass, by component and by primitive.

    Parameters
    ----------
    config : Qwen2Config or mapping
        The architecture: a transformers config, or a mapping of its fields such as `QWEN_05B`.
    batch_size, length : int
        Rows, and new tokens a row (padding included).
    lora_r : int
        Rank of the unmerged LoRA branches; 0 for none, or for a merged adapter.
    target_modules : sequence of str
        Which matrices have a branch, in every layer.
    head_bias : bool
        Whether the LM head has a bias.
    convention : {"exact", "course"}
        Grouped-query attention as it runs, or counted as full multi-head attention.
    vocabulary : int, optional
        Tokens the LM head scores; the whole vocabulary by default.
    past : int
        Tokens a row already in the KV cache.
    scored_positions : int, optional
        Positions a row at which the LM head runs; all `length` by default.
    loss : bool
        Add the cross-entropy at the scored positions.

    Raises
    ------
    UserError
        For a size below one, an unknown convention or target, or more scored tokens or positions than there are.
    """
    check_sizes(batch_size, length, lora_r, past)
    if convention not in CONVENTIONS:
        raise UserError(f"convention {convention!r}: choose from {', '.join(CONVENTIONS)}")
    positions = within("scored_positions", scored_positions, length)
    if not is_qwen2(config):
        return _counted_account(
            config, batch_size, length, lora_r, target_modules, head_bias, vocabulary, past, positions
        )
    size = Size.of(config)
    tokens = within("vocabulary", vocabulary, size.vocab)
    groups = size.heads if convention == "course" else size.groups
    rows, scored, keys = batch_size * length, batch_size * positions, past + length  # R, S, K
    softmax_rows = batch_size * size.heads * length
    scores = softmax_rows * keys  # entries of one layer's attention matrices
    matrices = layer_matrices(size, groups)
    targets = lora_targets(matrices, lora_r, target_modules)
    operations: dict[str, dict[str, int]] = {"embedding": {}}
    matmuls: dict[str, int] = {}

    def count(component: str, **primitives: int) -> None:
        counts = operations.setdefault(component, {})
        for primitive, n in primitives.items():
            counts[primitive] = counts.get(primitive, 0) + n

    def product(component: str, paths: Iterable[str], m: int, n: int, p: int, copies: int = 1) -> None:
        for path in paths:
            count(component, multiply=copies * m * n * p, add=copies * m * (n - 1) * p)
            matmuls[path] = matmuls.get(path, 0) + 2 * copies * m * n * p

    layers, heads = size.layers, batch_size * size.heads
    attention = _paths(layers, "self_attn")
    norms = (2 * layers + 1) * rows
    count("rmsnorm", multiply=3 * size.hidden * norms, add=size.hidden * norms, divide=2 * norms, sqrt=norms)
    for name in ("q_proj", "k_proj", "v_proj"):
        path, i, o = matrices[name]
        product(name, _paths(layers, path), rows, i, o)
        count(name, add=layers * rows * o)
    rotated = layers * rows * (size.heads + groups) * size.head_dim
    count("rope", multiply=2 * rotated, add=rotated, negate=rotated // 2)
    product("attention scores", attention, length, size.head_dim, keys, heads)
    count("scale and mask", multiply=layers * scores, add=layers * scores)
    # keys − 1 additions a softmax row
    count("softmax", subtract=layers * scores, exp=layers * scores, add=layers * (scores - softmax_rows))
    count("softmax", divide=layers * scores)
    product("attention values", attention, length, keys, size.head_dim, heads)
    for name in ("o_proj", "gate_proj", "up_proj", "down_proj"):
        path, i, o = matrices[name]
        product(name, _paths(layers, path), rows, i, o)
    entries = layers * rows * size.intermediate
    count("swiglu", negate=entries, exp=entries, add=entries, divide=entries, multiply=entries)
    count("residual", add=2 * layers * rows * size.hidden)
    for name in targets:
        path, i, o = matrices[name]
        product("lora", _paths(layers, f"{path}.lora_A"), rows, i, lora_r)
        product("lora", _paths(layers, f"{path}.lora_B"), rows, lora_r, o)
        count("lora", multiply=layers * rows * o, add=layers * rows * o)
    product("lm_head", ["lm_head"], scored, size.hidden, tokens)
    if head_bias:
        count("head bias", add=scored * tokens)
    if loss:
        count("loss", subtract=2 * scored * tokens, exp=scored * tokens, add=scored * (tokens - 1), log=scored)
        count("loss", negate=scored, add=scored - 1, divide=1)
    return Account(operations, matmuls, convention, *count_parameters(config, lora_r, target_modules, head_bias))


def training_flops(config: object, batch_size: int, length: int, **settings: object) -> int:
    """FLOPs of one training step: three forward passes with the loss (settings as in `forward_account`)."""
    return forward_account(config, batch_size, length, loss=True, **settings).training


def generation_flops(config: object, batch_size: int, prompt: int, new_tokens: int, **settings: object) -> int:
    """FLOPs of generating `new_tokens` a row with a KV cache.

    One pass over the prompt, with the LM head at its last position, gives the first new token; each further one is a
    pass of one token that sees everything before it. The last new token is never fed back, so n new tokens are the
    prompt and n − 1 such passes. The cost of a pass is linear in the tokens before it, so their sum is that of an
    arithmetic series, and the first and the last pass are enough to know it.

    Parameters
    ----------
    config, batch_size
        As in `forward_account`.
    prompt, new_tokens : int
        Tokens a row (padding included), and tokens to generate, at least one each.
    **settings
        `lora_r`, `target_modules`, `head_bias`, `convention`, `vocabulary`, as in `forward_account`.
    """
    if new_tokens < 1:
        raise UserError(f"new_tokens {new_tokens}: must be at least 1")
    total = forward_account(config, batch_size, prompt, scored_positions=1, **settings).forward
    if steps := new_tokens - 1:
        ends = (prompt, prompt + steps - 1)
        total += (
            steps * sum(forward_account(config, batch_size, 1, past=past, **settings).forward for past in ends) // 2
        )
    return total


def count_parameters(
    config: object,
    lora_r: int = 0,
    target_modules: Sequence[str] = ("q_proj", "v_proj"),
    head_bias: bool = True,
) -> tuple[int, int]:
    """Parameters of the base model (a tied matrix once), and trainable ones: the LoRA matrices and the head bias.

    The head bias is a whole vocabulary long, is trained, and is not part of the base.
    """
    if is_qwen2(config):
        base, branches = count_qwen2_parameters(config, lora_r, target_modules)
        return base, branches + head_bias * Size.of(config).vocab
    from . import counter

    shapes = counter.lora_shapes(config, target_modules) if lora_r else {}
    return counter.count_parameters(config), lora_r * sum(map(sum, shapes.values())) + head_bias * config.vocab_size


def flops_json(account: Account, train: bool) -> dict[str, object]:
    """The account as the `flops` command writes it; `total` is three forward passes when `train`, one otherwise."""
    return {
        "components": account.components,
        "primitives": account.primitives,
        "forward": account.forward,
        "total": account.training if train else account.forward,
        "convention": account.convention,
        "parameters": account.parameters,
        "trainable": account.trainable,
    }


def _paths(layers: int, module: str) -> list[str]:
    return [f"model.layers.{layer}.{module}" for layer in range(layers)]


def _counted_account(
    config: object,
    batch_size: int,
    length: int,
    lora_r: int,
    target_modules: Sequence[str],
    head_bias: bool,
    vocabulary: int | None,
    past: int,
    positions: int,
) -> Account:
    """The account of any other architecture: measured products, LoRA's from the shapes of the matrices it adapts."""
    from . import counter

    head, matmuls = counter.count_forward(config, batch_size, length, past)
    tokens = within("vocabulary", vocabulary, config.vocab_size)
    matmuls[head] = matmuls[head] * positions * tokens // (length * config.vocab_size)
    for path, shape in (counter.lora_shapes(config, target_modules) if lora_r else {}).items():
        matmuls[f"{path}.lora"] = 2 * batch_size * length * lora_r * sum(shape)
    operations: dict[str, dict[str, int]] = {}
    for path, flops in matmuls.items():
        counts = operations.setdefault(path.rpartition(".")[2], {"multiply": 0, "add": 0})
        counts["multiply"] += flops // 2
        counts["add"] += flops // 2
    return Account(operations, matmuls, "FlopCounterMode", *count_parameters(config, lora_r, target_modules, head_bias))
