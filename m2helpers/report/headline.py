"""The front page's table, and the sentences beneath it that say what its figures rest on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd

from ..evaluation.protocols import P5_CONTEXTS
from ..evaluation.scores import Result, paired_change
from ..experiments.planning import STAGE_ORDER, stage_label
from ..files import read_json
from ..flops.account import CAP
from ..paths import checkpoint_folder
from .findings import NO_FORECAST, figure, markdown_header, seed_records
from .tables import baseline_results, comparable, interval, published_table, stage_results, verdict
from .terms import LAW, beside_the_law


def headline_table(base: str = "embedded") -> str:
    """The front page's table in Markdown: P5 error by stage and context with intervals, the baselines, and apart the published."""
    ours = stage_results(base)
    lines = markdown_header("P5 mean absolute error (population units)", *(f"S = {s}" for s in P5_CONTEXTS))
    for stage, rows in ours.items():
        cells = dict.fromkeys(P5_CONTEXTS, "–")  # not measured
        cells |= {r.context: NO_FORECAST if r.mae is None else f"**{r.mae:.4f}** ({interval(r)})" for r in rows}
        lines.append(f"| {base} base, {stage_label(stage)} | {' | '.join(cells[s] for s in P5_CONTEXTS)} |")
    for name, rows in baseline_results().items():
        lines.append(f"| baseline: {name} | {' | '.join(f'{row.mae:.4f}' for row in rows)} |")
    said = [
        f"All on equal terms: truth and forecasts rounded alike. {beside_the_law(base)}".strip(),
        _verdicts(ours),
        _provenance(base, ours),
        pretraining_cost(base),
        published_table(),
    ]
    return "\n".join([*lines, *(line for paragraph in said if paragraph for line in ("", paragraph))])


def brief_table(base: str = "embedded") -> str:
    """The README's table in Markdown: before fine-tuning, the run that went furthest, and what one would otherwise take."""
    ours = stage_results(base)
    furthest = [stage for stage in ours if stage in STAGE_ORDER][-1]
    rivals = {LAW: f"{LAW}, told the law behind the data", "vector autoregression": "vector autoregression"}
    rows = {stage_label("untrained"): ours["untrained"], f"**{stage_label(furthest)}, fine-tuned**": ours[furthest]}
    rows |= {label: baseline_results()[name] for name, label in reversed(rivals.items())}
    lines = markdown_header("mean absolute error, five steps ahead", *(f"after {s} tokens" for s in P5_CONTEXTS))
    for label, results in rows.items():
        cells = [NO_FORECAST if row.mae is None else f"{row.mae:.4f}" for row in results]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def cost_line(base: str = "embedded") -> str:
    """What the run that went furthest cost, with the pre-training of its base, in one sentence."""
    folder = checkpoint_folder(base)
    stage = [stage for stage in stage_results(base) if stage in STAGE_ORDER][-1]
    run = pd.read_csv(folder / stage / "history.csv")["flops"].iloc[-1]
    before = read_json(folder / "base" / "pretraining.json")["total"]["flops"]
    spent = pd.read_csv(folder / "ledger.csv")["flops"].sum()
    return (
        f"**What it cost:** {figure(before, 2)} FLOPs to pre-train the base on synthetic series, then {figure(run, 2)} to fine-tune *{stage_label(stage)}*; "
        f"all experiments on the base together {figure(spent, 2)}, of a ceiling of {figure(CAP)} that pre-training is not charged to."
    )


def pretraining_cost(base: str = "embedded") -> str:
    """What went into a base before any fine-tuning, in one sentence; empty if nothing is recorded."""
    path = checkpoint_folder(base) / "base" / "pretraining.json"
    if not path.is_file():
        return ""
    record = read_json(path)
    sittings = pd.DataFrame([*record["before"], record])
    by_machine = sittings.groupby("machine")["flops"].sum()
    most = str(by_machine.idxmax())
    return (
        f"*Before fine-tuning* does not mean untrained: pre-training on synthetic series took {figure(record['total']['flops'], 2)} FLOPs, not charged to "
        f"the {figure(CAP)}, {by_machine.max() / by_machine.sum():.0%} of them on one {most.split(',')[0]}, and the families of those series were chosen with the "
        "validation series in view."
    )


def _verdicts(ours: Mapping[str, Sequence[Result]]) -> str:
    """Each later stage against the base before fine-tuning in words, where they can be compared; those that say the same together."""
    before = {row.context: row for row in ours.get("untrained", [])}
    stages: dict[str, list[str]] = {}  # what is said, and of which
    for stage, rows in ours.items():
        known = all(row.context in before and comparable(row, before[row.context]) for row in rows)
        if stage != "untrained" and known:
            words = [verdict(paired_change(row, before[row.context])) for row in rows]
            each = "; ".join(f"S = {row.context}, {word}" for row, word in zip(rows, words, strict=True))
            said = f"{words[0]} at every S" if len(set(words)) == 1 else each
            stages.setdefault(said, []).append(f"*{stage_label(stage)}*")
    told = [
        f"{' and '.join([', '.join(names[:-1])] * (len(names) > 1) + names[-1:])}: {said}."
        for said, names in stages.items()
    ]
    return f"Beside the base before fine-tuning, on the windows both got valid: {' '.join(told)}" if told else ""


def _provenance(base: str, ours: Mapping[str, Sequence[Result]]) -> str:
    """What the figures rest on: split, intervals, seeds, forecasts that count."""
    seeds = {stage: len(seed_records(checkpoint_folder(base), stage)) for stage in ours if stage != "untrained"}
    several = ", ".join(f"{stage} {n}" for stage, n in seeds.items()) + ", of which the first is shown"
    trained = several if max(seeds.values(), default=1) > 1 else "1"
    valid = sum(row.n_valid for rows in ours.values() for row in rows)
    total = sum(row.n for rows in ours.values() for row in rows)
    return (
        f"Test split of the shipped data, 95 % bootstrap intervals in brackets, training seeds: {trained}; "
        f"{valid:,} of {total:,} forecasts of ours parsed whole and count."
    )
