"""The pages' marked blocks: every figure that a run could produce is read from its record and filled in here."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from ..data import load_dataset, statistics_table
from ..files import UserError, read_json, write_text
from ..flops.account import CAP
from ..paths import CLUSTER_TIMES, ROOT, SHIPPED_BENCHMARKS, SHIPPED_CLASSICS, checkpoint_folder
from .conclusions import answer, bought, limits, on_qwen
from .distributions import by_step_table, recorded_distributions
from .findings import ablations_table, advice, figure, markdown_header, seeds_table, sweeps_table
from .gaps import gap_passage, recorded_gaps
from .goals import goals_table
from .headline import brief_table, cost_line, headline_table
from .prices import cost_blocks
from .terms import beside_the_law, duels_table, terms_table
from .trust import trust_table


def pretraining_summary(base: str = "embedded") -> str:
    """Where a base comes from in one sentence: tokens, time by machine, FLOPs; from the record beside its weights."""
    path = checkpoint_folder(base) / "base" / "pretraining.json"
    if not path.is_file():
        return "No pre-training has been recorded for this base."
    record = read_json(path)
    sittings = pd.DataFrame([*record["before"], record])[["machine", "tokens", "seconds"]]
    where = [
        f"{row['tokens'] / 1e6:,.0f} million in {row['seconds'] / 60:,.0f} minutes on {machine}"
        for machine, row in sittings.groupby("machine", sort=False).sum().iterrows()
    ]
    return (
        f"Pre-training took {record['total']['tokens'] / 1e6:,.0f} million tokens in {len(sittings)} sittings ({'; '.join(where)}) "
        f"and {figure(record['total']['flops'], 2)} FLOPs, which are not charged to the {figure(CAP)}."
    )


def spending_table(base: str = "embedded") -> str:
    """What the committed ledger of a base holds in Markdown, by stage and kind."""
    path = checkpoint_folder(base) / "ledger.csv"
    if not path.is_file():
        return "No ledger has been recorded for this base."
    spent = pd.read_csv(path).pivot_table("flops", "stage", "kind", "sum", fill_value=0, sort=False)
    kinds = list(spent)
    lines = markdown_header("stage", *kinds, "together", f"share of {figure(CAP)}")
    for stage, row in [*spent.iterrows(), ("**all**", spent.sum())]:
        cells = [figure(value, 3) for value in [*row, row.sum()]]
        lines.append(f"| {stage} | {' | '.join(cells)} | {row.sum() / CAP:.4%} |")
    return "\n".join(lines)


def costs_table() -> str:
    """Time and memory of each notebook in Markdown, from the record that refreshing them writes."""
    path = ROOT / "docs" / "notebook_costs.json"
    rows = read_json(path)["notebooks"] if path.is_file() else []
    lines = markdown_header("notebook", "time (s)", "peak memory (MB)")
    lines += [f"| {row['notebook']} | {row['seconds']:.0f} | {row['peak_memory_mb']:.0f} |" for row in rows]
    return "\n".join(lines)


def benchmarks_table() -> str:
    """Every recorded benchmark in Markdown: what was compared, where and when, and a table of its sides."""
    names = {
        "work": "work", "context": "context (tokens)", "flops": "FLOPs", "side": "", "seconds": "seconds, median", "ratio": "times as fast",
        "seconds_after_prefill": "after the prefill", "ratio_after_prefill": "times as fast there",
        "peak_gb": "peak memory (GB)", "peak_ratio": "of the first row's",
        "first_seconds": "longest to warm up", "utilisation": "of the peak",
        "mae": "P5 error", "mae_change": "change (%)",
    }  # fmt: skip
    parts = []
    for entry in read_json(SHIPPED_BENCHMARKS).values() if SHIPPED_BENCHMARKS.is_file() else []:
        shown = [key for key in names if key in entry["rows"][0]]
        lines = markdown_header(*(names[key] for key in shown))
        for row in entry["rows"]:
            cells = [row[key] if isinstance(row[key], str) else figure(row[key]) for key in shown]
            lines.append(f"| {' | '.join(cells)} |")
        for side, shares in entry.get("profile", {}).items():
            where = ", ".join(f"{kind} {share:.0%}" for kind, share in shares.items())
            lines += ["", f"Where the time of *{side}* goes: {where}."]
        parts.append("\n".join([f"**{entry['about']}** {entry['machine']}; {entry['date']}.", "", *lines]))
    return "\n\n".join(parts) or "No benchmark has been recorded."


def cluster_table() -> str:
    """How much sooner a small plan is done by two workers, in Markdown."""
    if not CLUSTER_TIMES.is_file():
        return "Not timed yet: `python -m tests.campaigns.cluster` does it, on a machine that is idle."
    record = read_json(CLUSTER_TIMES)
    lines = markdown_header("", "seconds, each time", "times as fast")
    of_one = min(record["rows"][0]["seconds"])
    for row in record["rows"]:
        each = ", ".join(f"{seconds:.0f}" for seconds in row["seconds"])
        lines.append(f"| {row['way']} | {each} | {of_one / min(row['seconds']):.2f} |")
    alike = "the records of both are the same to the byte" if record["alike"] else "their records differ"
    where = f"{record['machine']}, on which {record['load']:.0f} other programs were running; {record['date']}"
    return "\n".join([*lines, "", f"{record['about']} Ray's own start is counted; {alike}. {where}."])


def classic_table() -> str:
    """The classic public series in Markdown: errors of the base and of other methods over that of the last value, wins and losses."""
    if not SHIPPED_CLASSICS.is_file():
        return "No forecast of classic series has been recorded."
    record = read_json(SHIPPED_CLASSICS)
    rows = record["rows"]
    ours, *others = rows[0]["errors"]
    lines = markdown_header("error, last value = 1", "windows", f"{record['base']} base", *others)
    for row in rows:
        known = [error for error in row["errors"].values() if error is not None]
        cells = [
            "–" if error is None else f"**{error:.2f}**" if error == min(known) else f"{error:.2f}"
            for error in row["errors"].values()
        ]
        lines.append(f"| {row['series']} | {row['valid']} of {row['windows']} | {' | '.join(cells)} |")
    pairs = [[row["duels"][method] for row in rows if row["duels"]] for method in others]
    totals = [" / ".join(str(sum(column)) for column in zip(*pair, strict=True)) or "–" for pair in pairs]
    windows = sum(row["windows"] for row in rows)
    lines.append(f"| *windows that the base wins / loses against it* | {windows} | | {' | '.join(totals)} |")
    won = [
        f"{method} on {sum(row['errors'][ours] < row['errors'][method] for row in rows if row['errors'][ours] is not None)}"
        for method in others
    ]
    return "\n".join(
        [
            *lines,
            "",
            f"Each window: {record['known']} steps known, {record['ahead']} forecast, one set of settings for all series, nothing tuned on them. By mean error the base is "
            f"better than {', '.join(won)} of {len(rows)} series. So few windows show whether it works and do not rank methods. {record['machine']}; {record['date']}.",
        ]
    )


def blocks() -> dict[str, str]:
    """Every marked block by name."""
    dataset = load_dataset()
    return {
        **cost_blocks(dataset),
        "results": headline_table(),
        "brief": brief_table(),
        "cost": cost_line(),
        "terms": terms_table(),
        "duels": duels_table(),
        "law": beside_the_law(),
        "answer": answer(),
        "bought": bought(),
        "floor-gap": gap_passage(*recorded_gaps()),
        "on-qwen": on_qwen(),
        "limits": limits(),
        "distributions": recorded_distributions(),
        "distributions-by-step": by_step_table(),
        "pretraining": pretraining_summary(),
        "seeds": seeds_table(),
        "sweeps": sweeps_table(),
        "ablations": ablations_table(),
        "advice": advice(),
        "spending": spending_table(),
        "costs": costs_table(),
        "benchmarks": benchmarks_table(),
        "goals": goals_table(),
        "classic": classic_table(),
        "cluster": cluster_table(),
        "trust": trust_table(),
        "data-statistics": statistics_table(dataset),
    }


def fill_blocks(text: str, contents: Mapping[str, str]) -> str:
    """Replace what stands between ``<!-- begin: NAME -->`` and ``<!-- end: NAME -->`` by the content of that name.

    Raises
    ------
    UserError
        If a block has no content of its name, or no end.
    """

    def replace(match: re.Match) -> str:
        name = match.group(1)
        if name not in contents:
            raise UserError(f"block {name!r} has no content: choose from {', '.join(contents)}")
        return f"<!-- begin: {name} -->\n{contents[name]}\n<!-- end: {name} -->"

    if text.count("<!-- begin: ") != text.count("<!-- end: "):
        raise UserError("a marked block has no end: add <!-- end: NAME --> after it")
    return re.sub(r"<!-- begin: ([\w-]+) -->.*?<!-- end: \1 -->", replace, text, flags=re.DOTALL)


def all_pages() -> list[Path]:
    """Every page that may hold marked blocks.

    Raises
    ------
    UserError
        If there are none: what is installed has the records, and no pages.
    """
    if not (ROOT / "docs" / "index.md").is_file():
        raise UserError(f"{ROOT}: has no pages to fill; run this in a checkout, or set M2_HOME to one")
    return [ROOT / "README.md", ROOT / "data" / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]


def fill_pages() -> list[Path]:
    """Fill the blocks of every page; return those that changed."""
    pages, contents, changed = all_pages(), blocks(), []
    for page in pages:
        before = page.read_text(encoding="utf-8")
        after = fill_blocks(before, contents)
        if after != before:
            write_text(page, after)
            changed.append(page)
    return changed
