"""What the conclusion says: every figure in it is read from a record, and a missing record is said to be missing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from ..evaluation.measure import rounding_cost
from ..evaluation.protocols import P5_CONTEXTS
from ..evaluation.scores import Result, duel, paired_change
from ..experiments.planning import FINAL_STAGES, PLANS, stage_label
from ..files import read_json
from ..flops.account import CAP, forward_account, training_flops
from ..flops.architecture import QWEN_05B
from ..paths import checkpoint_folder
from .findings import figure, markdown_header, seed_records
from .tables import baseline_results, shipped_data, stage_results, verdict
from .terms import LAW

_MISSING = "No run has been recorded for this base, so there is nothing to conclude."


def answer(base: str = "embedded") -> str:
    """The question's answer in Markdown: before and after by context, against the usual method and against the fit of the law."""
    results = stage_results(base)
    if not {"untrained", "final"} <= results.keys():
        return _MISSING
    furthest, rivals = list(results)[-1], baseline_results()
    lines = []
    for row in results[furthest]:
        before, final = (_at(results[stage], row.context) for stage in ("untrained", "final"))
        usual, law = (_at(rivals[name], row.context) for name in ("vector autoregression", LAW))
        change, low, high = paired_change(row, before)
        counts = duel(row, law)
        lines.append(
            f"- **S = {row.context}.** {_mae(before)} before fine-tuning, {_mae(final)} after the final run, {_mae(row)} after *{stage_label(furthest)}*: "
            f"{change:+.0f} % ({low:+.0f} to {high:+.0f}), {verdict((change, low, high))}. A vector autoregression has {_mae(usual)}; the {LAW}, which is told the law, "
            f"{_mae(law)}, and is better than *{stage_label(furthest)}* in {counts.losses / sum(counts):.0%} of the windows, as good in {counts.ties / sum(counts):.0%}."
        )
    return "\n".join(lines)


def bought(base: str = "embedded") -> str:
    """What each run's FLOPs bought in Markdown: its price, the error it left, and what a further unit of price took away."""
    results, spent = stage_results(base), run_flops(base)
    if not spent:
        return _MISSING
    names = ["run", "FLOPs", f"share of {figure(CAP)}", *(f"error left, S = {s}" for s in P5_CONTEXTS)]
    lines = markdown_header(*names)
    before = results["untrained"]
    for stage, flops in spent.items():
        left = [f"{_left(row, _at(before, row.context)):.0%}" for row in results[stage]]
        lines.append(f"| {stage_label(stage)} | {figure(flops, 3)} | {flops / CAP:.3%} | {' | '.join(left)} |")
    first, *later = spent
    said = [
        "*Error left*: mean absolute error over that of the base before fine-tuning. Each run starts from the base; the price is that of its training and validation."
    ]
    for stage in later:
        changes = [paired_change(row, _at(results[first], row.context)) for row in results[stage]]
        words = "; ".join(
            f"S = {row.context}, {change[0]:+.0f} % ({change[1]:+.0f} to {change[2]:+.0f}), {verdict(change)}"
            for row, change in zip(results[stage], changes, strict=True)
        )
        said.append(
            f"For {spent[stage] / spent[first]:.1f} times the price of *{first}*, *{stage}* has, against it: {words}."
        )
    return "\n".join([*lines, "", " ".join(said), "", _by_half(base, spent)])


def run_flops(base: str = "embedded") -> dict[str, float]:
    """FLOPs of training and validating each recorded run, in the order of the stages."""
    found = {}
    for stage in stage_results(base):
        path = checkpoint_folder(base) / stage / "history.csv"
        if path.is_file():
            found[stage] = float(pd.read_csv(path)["flops"].iloc[-1])
    return found


def on_qwen() -> str:
    """What the same plan would be on Qwen2.5-0.5B, in Markdown: nothing of it was run, all of it follows from the architecture."""
    plan = PLANS["qwen2.5-0.5b"]
    account = forward_account(QWEN_05B, 4, 512, lora_r=8, loss=True)
    small = forward_account(QWEN_05B, 4, 512, lora_r=8, loss=True, vocabulary=14)
    head = sum(account.components[part] for part in ("lm_head", "head bias", "loss")) / account.forward
    runs = {stage: getattr(plan, stage) for stage in ("initial", *FINAL_STAGES)}
    lines = markdown_header("run", "FLOPs a step", "steps planned", f"share of {figure(CAP)}", "steps it buys")
    for stage, settings in runs.items():
        if settings is not None:
            price = training_flops(
                QWEN_05B,
                settings.batch_size,
                settings.max_length,
                lora_r=settings.lora_r,
                target_modules=settings.target_modules,
            )
            lines.append(
                f"| {stage_label(stage)} | {figure(price, 3)} | {settings.max_steps:,} | {settings.max_steps * price / CAP:.1%} | {CAP // price:,} |"
            )
    said = (
        f"A step at batch 4, 512 tokens and rank 8 spends {head:.0%} of itself on the head and the loss, for a vocabulary of {QWEN_05B['vocab_size']:,}; scoring "
        f"only the 14 characters of numeric text would take {1 - small.training / account.training:.0%} off. {account.trainable:,} numbers would be trained beside {account.parameters:,}."
    )
    return "\n".join([*lines, "", said])


def limits(base: str = "embedded") -> str:
    """What the figures rest on and do not cover, as a list in Markdown."""
    results = stage_results(base)
    if "final" not in results:
        return _MISSING
    row, dataset = results["final"][0], shipped_data()[0]
    seeds = {stage: len(seed_records(checkpoint_folder(base), stage)) for stage in results if stage != "untrained"}
    floor = rounding_cost(*shipped_data())[0].against_stored
    record = read_json(checkpoint_folder(base) / "base" / "pretraining.json")["total"]
    tested = len(dataset.part("test"))
    points = [
        f"**One base.** It was pre-trained once, on {record['tokens'] / 1e6:,.0f} million tokens. How much of each result is the luck of that, no interval here says.",
        f"**Few seeds.** Training seeds: {', '.join(f'{stage} {n}' for stage, n in seeds.items())}. Intervals cover the choice of test series.",
        f"**{tested} test series.** A window of P5 shares its series with others, which is why series are resampled and not windows; at S = {row.context} there are {row.n} windows.",
        f"**Two decimals.** On equal terms truth and forecast are both rounded, so an error of zero means the same text. Against the stored numbers, writing alone costs {floor.mae if floor else np.nan:.4f}.",
    ]
    return "\n".join(f"- {point}" for point in points)


def _by_half(base: str, spent: Mapping[str, float]) -> str:
    """When in each run its validation loss fell."""
    said = []
    for stage in spent:
        losses = pd.read_csv(checkpoint_folder(base) / stage / "history.csv")["val_loss"]
        start, half, end = losses.iloc[0], losses.iloc[: len(losses) // 2].min(), losses.min()
        said.append(f"*{stage}* {(start - half) / (start - end):.0%}")
    return (
        "Within a run the first FLOPs buy most: of the fall of the validation loss after the first record, the first half of the steps brought "
        f"{', '.join(said)}."
    )


def _at(rows: Sequence[Result], context: int) -> Result:
    return next(row for row in rows if row.context == context)


def _mae(row: Result) -> str:
    return "no valid forecast" if row.mae is None else f"{row.mae:.4f}"


def _left(row: Result, before: Result) -> float:
    return 1 + paired_change(row, before)[0] / 100
