"""Scores of forecasts that are distributions, as tables, and the picture of how well they are calibrated."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes

from ..evaluation.scores import DistributionScores, Result
from ..experiments.planning import stage_label
from .findings import markdown_header
from .plots import STAGES
from .tables import stage_results


def distributions_table(results: Sequence[Result] | Mapping[str, Sequence[Result]]) -> str:
    """CRPS, weighted quantile loss, coverage and width of the 80 % band, and the median's error in Markdown; empty if there are none."""
    rows = results if isinstance(results, Mapping) else {"": results}
    names = ("CRPS", "WQL", "80 % band covers", "its width", "MAE of the median", "its MASE", "valid")
    lines = markdown_header("distributions", "context", "", *names)
    for label, result, how, s in _scored(rows):
        cells = [
            f"{s.crps:.4f} ({s.ci_crps[0]:.4f}–{s.ci_crps[1]:.4f})",
            f"{s.wql:.4f} ({s.ci_wql[0]:.4f}–{s.ci_wql[1]:.4f})",
            f"{s.coverage_80:.0%} ({s.ci_coverage_80[0]:.0%}–{s.ci_coverage_80[1]:.0%})",
            f"{s.width_80:.4f}",
            f"{s.mae_median:.4f} ({s.ci_mae_median[0]:.4f}–{s.ci_mae_median[1]:.4f})",
            "–" if s.mase_median is None else f"{s.mase_median:.3f}",
            f"{s.n_valid} of {s.n}",
        ]
        lines.append(f"| {stage_label(label)} | {result.context} | {how} | {' | '.join(cells)} |")
    return "\n".join(lines) if len(lines) > 2 else ""


def recorded_distributions(base: str = "embedded") -> str:
    """`distributions_table` of what is recorded of a base's stages, and what it rests on."""
    results = stage_results(base)
    table = distributions_table(results)
    if not table:
        return "No distribution has been recorded for this base."
    scored = [s for _, _, _, s in _scored(results)]
    machines = dict.fromkeys(r.machine for rows in results.values() for r in rows if r.distribution and r.machine)
    return (
        f"{table}\n\nTest split, against the series as stored; {max(s.samples for s in scored)} paths a window, 95 % bootstrap intervals over series, on "
        f"{' and '.join(machines)}. *As drawn* is temperature 1. *Calibrated*: stretched about the median by a factor for each step ahead, fitted on "
        "validation series alone, so that the 80 % band covers 80 % there. MASE divides by the mean step of the context; WQL is over the nine deciles."
    )


def by_step_table(base: str = "embedded") -> str:
    """Coverage and width of the 80 % band by step ahead in Markdown."""
    steps = max((len(s.coverage_80_per_step) for _, _, _, s in _scored(stage_results(base))), default=0)
    lines = markdown_header("80 % band: covers; width", "context", "", *(f"{h} ahead" for h in range(1, steps + 1)))
    for label, result, how, s in _scored(stage_results(base)):
        pairs = zip(s.coverage_80_per_step, s.width_80_per_step, strict=True)
        cells = " | ".join(f"{covered:.0%}; {width:.4f}" for covered, width in pairs)
        lines.append(f"| {stage_label(label)} | {result.context} | {how} | {cells} |")
    return "\n".join(lines)


def plot_pit(axes: Sequence[Axes], results: Mapping[str, Sequence[Result]]) -> None:
    """PIT histograms, one panel a context and one line a stage: level where distributions are right, heavy ends where too narrow."""
    contexts = sorted({row.context for rows in results.values() for row in rows if row.distribution})
    for ax, context in zip(axes, contexts, strict=True):
        for stage, rows in results.items():
            for scores in (row.distribution for row in rows if row.context == context):
                if scores is not None:
                    edges = np.linspace(0, 1, len(scores.pit) + 1)
                    heights = np.multiply(scores.pit, len(scores.pit))
                    ax.stairs(heights, edges, color=STAGES[stage], lw=1.5, label=stage_label(stage))
        ax.axhline(1, color="0.4", lw=1, ls="--")
        ax.set(xlabel="probability integral transform", ylabel="density", ylim=(0, None))
        ax.set_title(f"S = {context}", loc="left", fontsize="medium")
        ax.label_outer()


def _scored(results: Mapping[str, Sequence[Result]]) -> Iterator[tuple[str, Result, str, DistributionScores]]:
    for label, rows in results.items():
        for row in rows:
            for how, scores in (("as drawn", row.distribution), ("calibrated", row.calibrated)):
                if scores is not None:
                    yield label, row, how, scores
