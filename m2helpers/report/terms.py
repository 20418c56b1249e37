"""What the records say on equal terms: every forecaster against the same truth, rounded alike, and against the series as stored.

The truth of P5 is rounded text, and a model's forecast is rounded with it. A forecaster that is not rounded would be charged for the
truth's rounding, so all are rounded here; what that leaves out is shown by the errors against the stored numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..evaluation.measure import rounding_cost
from ..evaluation.protocols import P5_CONTEXTS
from ..evaluation.scores import Errors, Result, duel
from ..experiments.planning import STAGE_ORDER, stage_label
from .findings import NO_FORECAST, markdown_header
from .tables import baseline_results, comparable, shipped_data, stage_results

LAW = "ODE fit"  # the baseline that is told the law that made the data
_RIVALS = (LAW, "vector autoregression")


def terms_table(base: str = "embedded") -> str:
    """P5 errors in Markdown, twice: against the truth as text, all rounded alike, and against the series as stored."""
    rows = _models(base) | {f"baseline: {name}": r for name, r in baseline_results().items()}
    kinds = [f"{kind}, S = {s}" for kind in ("equal terms", "as stored") for s in P5_CONTEXTS]
    lines = markdown_header("P5 mean absolute error", *kinds)
    for label, results in rows.items():
        lines.append(f"| {label} | {_cells(results)} | {_cells([r.against_stored for r in results])} |")
    floor = rounding_cost(*shipped_data())
    lines.append(f"| *rounding alone* | {_cells(floor)} | {_cells([r.against_stored for r in floor])} |")
    computed = [
        f"{name} {_cells([r.as_computed for r in results], ' / ')}" for name, results in baseline_results().items()
    ]
    machines = dict.fromkeys(r.machine for results in rows.values() for r in results if r.machine)
    again = f" Models were run again for those, on {' and '.join(machines)}." if machines else ""
    return "\n".join(
        [
            *lines,
            "",
            "*Equal terms*: truth and every forecast rounded as text is. *As stored*: against the series before they became text, where a "
            f"baseline's forecast is not rounded.{again} *Rounding alone* is the exact future, written as text. "
            f"Not rounded, and held against the rounded truth all the same, the baselines would have: {'; '.join(computed)}.",
        ]
    )


def duels_table(base: str = "embedded") -> str:
    """Windows of P5 that each stage wins, ties and loses against a rival, on equal terms, in Markdown."""
    rivals = baseline_results()
    lines = markdown_header("windows better / as good / worse", "than", *(f"S = {s}" for s in P5_CONTEXTS))
    for label, results in _models(base).items():
        for rival in _RIVALS:
            cells = {row.context: _shares(row, other) for row, other in _paired(results, rivals[rival])}
            lines.append(f"| {label} | {rival} | {' | '.join(cells.get(s, '–') for s in P5_CONTEXTS)} |")
    return "\n".join(lines)


def beside_the_law(base: str = "embedded") -> str:
    """How far the stage that went furthest is from the fit of the true equations, in one sentence; empty without a record to compare."""
    stages = [stage for stage in stage_results(base) if stage in STAGE_ORDER]
    pairs = _paired(stage_results(base)[stages[-1]], baseline_results()[LAW]) if stages else []
    pairs = [(row, law) for row, law in pairs if row.mae is not None and law.mae]
    if not pairs:
        return ""
    contexts = " / ".join(str(row.context) for row, _ in pairs)
    times = " / ".join(f"{row.mae / law.mae:.1f}" for row, law in pairs if row.mae is not None and law.mae)
    return (
        f"The {LAW} is told the law behind the data, which no other row is. The error of *{stage_label(stages[-1])}* is {times} times its "
        f"error (S = {contexts}); window by window, *{stage_label(stages[-1])}* is better / as good / worse than it in "
        f"{'; '.join(_shares(row, law) for row, law in pairs)}."
    )


def _models(base: str) -> dict[str, list[Result]]:
    return {f"{base} base, {stage_label(stage)}": rows for stage, rows in stage_results(base).items()}


def _paired(results: Sequence[Result], rivals: Sequence[Result]) -> list[tuple[Result, Result]]:
    """Each result beside the rival's of the same context, where both were measured on the same data."""
    known: Mapping[int, Result] = {rival.context: rival for rival in rivals}
    pairs = [(row, known[row.context]) for row in results if row.context in known]
    return [(row, rival) for row, rival in pairs if row.data_sha256 == rival.data_sha256 and comparable(row, rival)]


def _shares(row: Result, rival: Result) -> str:
    counts = duel(row, rival)
    return " / ".join(f"{count / sum(counts):.0%}" for count in counts)


def _cells(results: Sequence[Result | Errors | None], between: str = " | ") -> str:
    return between.join("–" if r is None else NO_FORECAST if r.mae is None else f"{r.mae:.4f}" for r in results)
