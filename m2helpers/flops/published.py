"""Published FLOP figures for one training step of Qwen2.5-0.5B, and what our account must change to meet them.

Four write-ups of the same course bill a step at batch 4, length 512, rank 8 or near, with 35 % between them. None gives
its terms one by one, so an explanation here is arithmetic: the differences below, alone or together, that bring our
account nearest. A figure that is met may still have been reached another way, and one that is not stays unexplained.
"""

from __future__ import annotations

from itertools import combinations

from .account import forward_account
from .architecture import QWEN_05B

PUBLISHED_STEPS = (8.00e12, 7.04e12, 6.76e12, 5.94e12)  # FLOPs a training step
PUBLISHED_P5_SHARE = 0.162  # of the cap, billed for one P5 table over the test split of the course's file
ATTENTION = ("attention scores", "scale and mask", "softmax", "attention values")
DIFFERENCES = {
    "multi-head": "grouped-query attention counted as multi-head",
    "heads 128": "head dimension 128 for 64, everywhere",
    "products 128": "head dimension 128 for 64, in the attention products only",
    "no attention": "attention scores, softmax and values missing",
    "no head": "LM head missing",
    "dense rope": "rotary embedding of q and k counted as two products with a (hidden × hidden) matrix",
}
_EXCLUSIVE = ({"heads 128", "products 128"}, {"products 128", "no attention"})


def step_flops(differences: tuple[str, ...], batch_size: int = 4, length: int = 512, lora_r: int = 8) -> int:
    """FLOPs of a training step of Qwen2.5-0.5B, counted with some of `DIFFERENCES` and without the loss.

    Parameters
    ----------
    differences : tuple of str
        Keys of `DIFFERENCES`; none gives our `exact` account, `multi-head` alone our `course` account.
    batch_size, length, lora_r : int
        The step.
    """

    def components(**changes: int) -> dict[str, int]:
        convention = "course" if "multi-head" in differences else "exact"
        return forward_account(QWEN_05B | changes, batch_size, length, lora_r=lora_r, convention=convention).components

    parts = components(head_dim=128) if "heads 128" in differences else components()
    if "products 128" in differences:
        wide = components(head_dim=128)
        parts |= {name: wide[name] for name in ("attention scores", "attention values")}
    if "no attention" in differences:
        parts |= dict.fromkeys(ATTENTION, 0)
    if "no head" in differences:
        parts |= {"lm_head": 0, "head bias": 0}
    if "dense rope" in differences:
        hidden, layers = QWEN_05B["hidden_size"], QWEN_05B["num_hidden_layers"]
        parts["rope"] = 2 * layers * batch_size * length * hidden * (2 * hidden - 1)
    return 3 * sum(parts.values())


def accounts(**step: int) -> dict[tuple[str, ...], int]:
    """Every account that some set of `DIFFERENCES` gives, fewest differences first: the set's keys → FLOPs of a step.

    Sets whose members contradict one another are left out. `step` is as in `step_flops`.
    """
    sets = (chosen for size in range(len(DIFFERENCES) + 1) for chosen in combinations(DIFFERENCES, size))
    return {
        chosen: step_flops(chosen, **step) for chosen in sets if not any(pair <= set(chosen) for pair in _EXCLUSIVE)
    }


def explain(figure: float, within: float = 0.005, **step: int) -> tuple[tuple[str, ...], float]:
    """The fewest differences that bring our account within a share of a published figure, else the nearest ones.

    Parameters
    ----------
    figure : float
        Published FLOPs of a step.
    within : float
        Relative error at which a figure counts as met.
    **step
        `batch_size`, `length`, `lora_r`, as in `step_flops`.

    Returns
    -------
    tuple of str
        Keys of `DIFFERENCES`.
    float
        What remains: (figure − ours) / figure.
    """
    found = [(chosen, (figure - ours) / figure) for chosen, ours in accounts(**step).items()]
    met = [item for item in found if abs(item[1]) <= within]
    if met:
        return min(met, key=lambda item: (len(item[0]), abs(item[1])))
    return min(found, key=lambda item: abs(item[1]))
