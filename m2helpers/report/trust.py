"""What the campaigns tried, from the record that they write (`tests/campaigns/record.py`)."""

from __future__ import annotations

from collections import Counter
from typing import Any

from ..files import read_json
from ..paths import ROOT
from .findings import markdown_header


def trust_table() -> str:
    """Every campaign's counts in Markdown: inputs by reader, faults by work, numbers, platforms, the image."""
    path = ROOT / "docs" / "trust.json"
    record: dict[str, Any] = read_json(path) if path.is_file() else {}
    parts = [_inputs(record.get("fuzz")), _faults(record.get("faults")), *_lines(record)]
    return "\n\n".join(part for part in parts if part) or "No campaign has been recorded."


def _inputs(entry: dict[str, Any] | None) -> str:
    if not entry:
        return ""
    ended = entry["ended"]
    total = sum(sum(counts.values()) for counts in ended.values())
    lines = [f"**{total:,} inputs** (seed {entry['seed']}), {entry['date']}:", ""]
    lines += markdown_header("read as", "inputs", "a result, checked", "refused in one line", "wrong usage")
    for reader, counts in ended.items():
        cells = [sum(counts.values()), *(counts.get(how, 0) for how in ("done", "refused", "usage"))]
        lines.append(f"| {reader} | {' | '.join(f'{cell:,}' for cell in cells)} |")
    return "\n".join(lines)


def _faults(entry: dict[str, Any] | None) -> str:
    if not entry:
        return ""
    lines = [f"**Faults** before each so many-th write, and signals at random moments, {entry['date']}:", ""]
    names = ("work", "writes", "a fault before every", "random moments", "faults met")
    lines += markdown_header(*names, "did not mind", "refused in one line", "died of the signal")
    for work, found in entry["works"].items():
        counts = Counter[str]()
        for name, count in found["met"].items():
            counts[name.rpartition(": ")[2]] += count
        cells = [counts[how] for how in ("done", "refused", "killed")]
        cells = [found["writes"], found["every"], found["moments"], sum(cells), *cells]
        lines.append(f"| {work} | {' | '.join(f'{cell:,}' for cell in cells)} |")
    return "\n".join([*lines, "", "All of them, done again, ended with the bytes of a run that was left alone."])


def _lines(record: dict[str, Any]) -> list[str]:
    said = []
    if entry := record.get("numbers"):
        said.append(
            f"**{entry['samples']:,} sampled forecasts** at {entry['settings']:,} settings, {entry['negative']:,} with negative values: {entry['invalid']:,} invalid. "
            f"**{entry['configurations']:,} configurations**: the account of FLOPs equals the counter in every module. {entry['date']}."
        )
    if entry := record.get("platforms"):
        served = sorted({name.partition(" ")[2] for name, there in entry["resolves"].items() if there})
        rest = sorted({name.partition(" ")[2] for name in entry["resolves"]} - set(served))
        pythons = sorted({name.partition(" ")[0] for name in entry["resolves"]})
        said.append(
            f"**The lock** resolves, from wheels alone, for Python {pythons[0]} to {pythons[-1]} on {', '.join(served)}; it does not on {', '.join(rest)}. {entry['date']}."
        )
    if entry := record.get("image"):
        tests = f"; {entry['tests']} inside" if "tests" in entry else ""
        said.append(
            f"**The image** has {entry['bytes'] / 1e9:.2f} GB and stops {entry['stop_seconds']:g} s after SIGTERM{tests} ({entry['with']}). {entry['date']}."
        )
    return said
