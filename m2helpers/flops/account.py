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
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypedDict, Unpack

from ..files import UserError
from .architecture import (
    Size,
    check_sizes,
    count_qwen2_parameters,
    layer_matrices,
    lora_targets,
    other_architecture,
    within,
)

if TYPE_CHECKING:
    from .architecture import Config

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


class Options(TypedDict, total=False):
    """What every pass of a piece of work has in common, as in `forward_account`."""

    lora_r: int
    target_modules: Sequence[str]
    head_bias: bool
    convention: str
    vocabulary: int | None


class PassOptions(Options, total=False):
    """And what is one pass's own."""

    past: int
    scored_positions: int | None


def forward_account(
    config: Config,
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
    """Account for one forward pass, by component and by primitive. All that its cost depends on is an argument, so they are many.

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
    parameters = count_parameters(config, lora_r, target_modules, head_bias)
    if (other := other_architecture(config)) is not None:
        from . import counter

        matmuls = counter.forward_matmuls(other, batch_size, length, past, positions, vocabulary)
        matmuls |= counter.lora_matmuls(other, batch_size * length, lora_r, target_modules)
        return Account(counter.operations(matmuls), matmuls, "FlopCounterMode", *parameters)
    size = Size.of(config)
    tokens = within("vocabulary", vocabulary, size.vocab)
    groups = size.heads if convention == "course" else size.groups
    tally = _Tally()
    _count_layers(tally, size, groups, batch_size, length, past + length)
    _count_lora(tally, size, groups, batch_size * length, lora_r, target_modules)
    _count_head(tally, size.hidden, batch_size * positions, tokens, head_bias)
    if loss:
        _count_loss(tally, batch_size * positions, tokens)
    return Account(tally.operations, tally.matmuls, convention, *parameters)


def training_flops(config: Config, batch_size: int, length: int, **options: Unpack[PassOptions]) -> int:
    """FLOPs of one training step: three forward passes with the loss (options as in `forward_account`).

    Examples
    --------
    >>> from m2helpers.flops import QWEN_05B
    >>> m2helpers.training_flops(QWEN_05B, 4, 512) == 3 * m2helpers.forward_account(QWEN_05B, 4, 512, loss=True).forward
    True
    """
    return forward_account(config, batch_size, length, loss=True, **options).training


def generation_flops(config: Config, batch_size: int, prompt: int, new_tokens: int, **options: Unpack[Options]) -> int:
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
    **options
        `lora_r`, `target_modules`, `head_bias`, `convention`, `vocabulary`, as in `forward_account`.

    Examples
    --------
    The first new token costs a pass over the prompt, with one position scored.

    >>> from m2helpers.flops import QWEN_05B
    >>> first = m2helpers.forward_account(QWEN_05B, 1, 100, scored_positions=1).forward
    >>> m2helpers.generation_flops(QWEN_05B, 1, 100, 1) == first
    True
    """
    if new_tokens < 1:
        raise UserError(f"new_tokens {new_tokens}: must be at least 1")
    total = forward_account(config, batch_size, prompt, scored_positions=1, **options).forward
    if steps := new_tokens - 1:
        ends = (prompt, prompt + steps - 1)
        first, last = (forward_account(config, batch_size, 1, past=past, **options).forward for past in ends)
        total += steps * (first + last) // 2
    return total


def count_parameters(
    config: Config,
    lora_r: int = 0,
    target_modules: Sequence[str] = ("q_proj", "v_proj"),
    head_bias: bool = True,
) -> tuple[int, int]:
    """Parameters of the base model (a tied matrix once), and trainable ones: the LoRA matrices and the head bias.

    The head bias is a whole vocabulary long, is trained, and is not part of the base.
    """
    if (other := other_architecture(config)) is None:
        base, branches = count_qwen2_parameters(config, lora_r, target_modules)
        return base, branches + head_bias * Size.of(config).vocab
    from . import counter

    base, branches = counter.count_parameters(other, lora_r, target_modules)
    return base, branches + head_bias * other.vocab_size


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


# ---------------------------------------------------------------- Qwen2, derived: the lines of the table above


@dataclass
class _Tally:
    """Operations and matrix products while they are added up, as in `Account`."""

    operations: dict[str, dict[str, int]] = field(default_factory=lambda: {"embedding": {}})
    matmuls: dict[str, int] = field(default_factory=dict)

    def count(self, component: str, **primitives: int) -> None:
        counts = self.operations.setdefault(component, {})
        for primitive, n in primitives.items():
            counts[primitive] = counts.get(primitive, 0) + n

    def product(self, component: str, paths: Iterable[str], m: int, n: int, p: int, copies: int = 1) -> None:
        """Products (m×n)·(n×p), so many `copies` in each module."""
        for path in paths:
            self.count(component, multiply=copies * m * n * p, add=copies * m * (n - 1) * p)
            self.matmuls[path] = self.matmuls.get(path, 0) + 2 * copies * m * n * p


def _paths(layers: int, module: str) -> list[str]:
    return [f"model.layers.{layer}.{module}" for layer in range(layers)]


def _count_layers(tally: _Tally, size: Size, groups: int, batch_size: int, length: int, keys: int) -> None:
    """Every norm, and the layers without their LoRA branches: `length` new tokens a row, each of which sees `keys`."""
    layers, rows, heads = size.layers, batch_size * length, batch_size * size.heads
    softmax_rows = heads * length
    scores = softmax_rows * keys  # entries of one layer's attention matrices
    matrices, attention = layer_matrices(size, groups), _paths(layers, "self_attn")
    norms = (2 * layers + 1) * rows
    tally.count("rmsnorm", multiply=3 * size.hidden * norms, add=size.hidden * norms, divide=2 * norms, sqrt=norms)
    for name in ("q_proj", "k_proj", "v_proj"):
        path, i, o = matrices[name]
        tally.product(name, _paths(layers, path), rows, i, o)
        tally.count(name, add=layers * rows * o)
    rotated = layers * rows * (size.heads + groups) * size.head_dim
    tally.count("rope", multiply=2 * rotated, add=rotated, negate=rotated // 2)
    tally.product("attention scores", attention, length, size.head_dim, keys, heads)
    tally.count("scale and mask", multiply=layers * scores, add=layers * scores)
    # keys − 1 additions a softmax row
    tally.count("softmax", subtract=layers * scores, exp=layers * scores, add=layers * (scores - softmax_rows))
    tally.count("softmax", divide=layers * scores)
    tally.product("attention values", attention, length, keys, size.head_dim, heads)
    for name in ("o_proj", "gate_proj", "up_proj", "down_proj"):
        path, i, o = matrices[name]
        tally.product(name, _paths(layers, path), rows, i, o)
    entries = layers * rows * size.intermediate
    tally.count("swiglu", negate=entries, exp=entries, add=entries, divide=entries, multiply=entries)
    tally.count("residual", add=2 * layers * rows * size.hidden)


def _count_lora(tally: _Tally, size: Size, groups: int, rows: int, lora_r: int, target_modules: Sequence[str]) -> None:
    matrices = layer_matrices(size, groups)
    for name in lora_targets(matrices, lora_r, target_modules):
        path, i, o = matrices[name]
        tally.product("lora", _paths(size.layers, f"{path}.lora_A"), rows, i, lora_r)
        tally.product("lora", _paths(size.layers, f"{path}.lora_B"), rows, lora_r, o)
        tally.count("lora", multiply=size.layers * rows * o, add=size.layers * rows * o)


def _count_head(tally: _Tally, hidden: int, scored: int, tokens: int, head_bias: bool) -> None:
    """The LM head at all `scored` positions together, for so many `tokens` of the vocabulary."""
    tally.product("lm_head", ["lm_head"], scored, hidden, tokens)
    if head_bias:
        tally.count("head bias", add=scored * tokens)


def _count_loss(tally: _Tally, scored: int, tokens: int) -> None:
    tally.count("loss", subtract=2 * scored * tokens, exp=scored * tokens, add=scored * (tokens - 1), log=scored)
    tally.count("loss", negate=scored, add=scored - 1, divide=1)
