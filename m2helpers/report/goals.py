"""What the benchmarks beside other packages were to reach, and what their records say: the ratio, its machine, or that nothing has been run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..files import read_json
from ..paths import SHIPPED_BENCHMARKS
from .findings import markdown_header

OURS = ("full vocabulary", "numeric head", "constrained")


@dataclass(frozen=True)
class Goal:
    """A ratio of speeds in one record, and of memory where that counts."""

    record: str
    command: str
    work: str
    ours: str
    other: str | None
    """None for the fastest of the others."""
    ratio: float
    """At least."""
    memory: float | None = None
    """At most."""


_FULL, _EMBEDDED = "Qwen2.5-0.5B's size, 20 windows", "embedded base, 100 windows"
_COMPILED, _STATIC = "peft + Trainer, torch.compile", "generate, static cache + torch.compile"
_TRAIN = ("rivals-cuda", "bench rivals --device cuda")
_DECODE = ("rivals-decode-cuda", "bench rivals-decode --device cuda")
GOALS = (
    Goal("rivals", "bench rivals --device cpu", "4 × 512", "numeric head", None, 2.5),
    Goal(*_TRAIN, "4 × 512", "numeric head", _COMPILED, 1.3, 0.5),
    Goal(*_TRAIN, "32 × 512", "numeric head", _COMPILED, 1.3, 0.5),
    Goal(*_DECODE, _FULL, "constrained", "transformers.generate", 4.0),
    Goal(*_DECODE, _FULL, "constrained", _STATIC, 1.5),
    Goal(*_DECODE, _EMBEDDED, "constrained", "transformers.generate", 5.0),
)


def goals_table() -> str:
    """Every goal in Markdown: what is compared, what was wanted, and what was measured where, or that it was not run."""
    record = read_json(SHIPPED_BENCHMARKS) if SHIPPED_BENCHMARKS.is_file() else {}
    lines = markdown_header(
        "work", "ours", "beside", "times as fast, wanted", "measured", "memory, of theirs", "machine"
    )
    for goal in GOALS:
        entry = record.get(goal.record)
        wanted = f"{goal.ratio:g}" + (f", at {goal.memory:g} of the memory" if goal.memory else "")
        cells = [goal.work, goal.ours, goal.other or "the fastest other", wanted]
        cells += _measured(entry, goal) if entry else ["**not run**", "–", f"none: `{goal.command}`"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _measured(entry: dict[str, Any], goal: Goal) -> list[str]:
    rows = {row["side"]: row for row in entry["rows"] if row["work"] == goal.work}
    others = [row for side, row in rows.items() if side not in OURS]
    ours, other = rows[goal.ours], rows[goal.other] if goal.other else min(others, key=lambda row: row["seconds"])
    memory = f"{ours['peak_gb'] / other['peak_gb']:.2f}" if "peak_gb" in ours and "peak_gb" in other else "–"
    named = "" if goal.other else f" ({other['side']})"
    return [f"{other['seconds'] / ours['seconds']:.2f}{named}", memory, f"{entry['machine']}; {entry['date']}"]
