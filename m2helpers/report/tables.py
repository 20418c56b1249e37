"""Results by stage from the records, and the published figures beside them, as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from ..data import load_dataset
from ..evaluation.measure import evaluate_baselines
from ..evaluation.protocols import P5_CONTEXTS
from ..evaluation.scores import Result, from_json, paired_change
from ..files import UserError, read_json
from ..paths import BASELINE_CACHE, DATA_FILE, checkpoint_folder
from ..settings import EMBEDDED, default_model
from ..text import Codec, fit_scale
from .findings import NO_FORECAST, markdown_header, seed_records

STAGE_FOLDERS = {"untrained": "base", "initial": "initial", "final": "final", "extended": "extended"}

# Qwen2.5-0.5B-Instruct on the course's own data file: P5 (MAE, MSE) by context, as published in a write-up of the course
# this project follows. They were not measured here and stand beside our rows for comparison only.
PUBLISHED_SOURCE = "Qwen2.5-0.5B, published (course's file, not run here)"
PUBLISHED = {
    "untrained": {128: (0.3427, 0.5510), 512: (0.1509, 0.1048), 768: (0.1167, 0.0700)},
    "initial": {128: (0.1746, 0.1356), 512: (0.0834, 0.0362), 768: (0.0651, 0.0297)},
    "final": {128: (0.0726, 0.0263), 512: (0.0240, 0.0028), 768: (0.0191, 0.0020)},
}
PUBLISHED_L50 = {
    "one write-up: 49 of 50 parsed": {"overall": 0.203, "prey": 0.217, "predator": 0.189},
    "the same author's final run": {"overall": 0.974},
}
PUBLISHED_L20 = (0.104, 0.0576)  # MAE and MSE of twenty steps after 51, published by another author
PUBLISHED_TRAINABLE = 242_688  # parameters, for LoRA on q and v of Qwen2.5-0.5B, in one of the same write-ups


def recorded_base(stage: str = "initial") -> str:
    """The base whose records a page shows: the one chosen (`default_model`) where it has that stage, else ``embedded``."""
    name = default_model()
    try:
        recorded = (checkpoint_folder(name) / STAGE_FOLDERS[stage] / "metrics.json").is_file()
    except UserError:  # a base that is not on this machine has no records here
        recorded = False
    return name if recorded else EMBEDDED


def stage_results(base: str, protocol: str = "P5") -> dict[str, list[Result]]:
    """Recorded results of each stage of a base on the test split, one a context: ``untrained``, ``initial``, ``final``, as far as they exist.

    Parameters
    ----------
    base : str
        Name of the base; its records are in ``checkpoint/<base>/``.
    """
    results = {}
    for stage, folder in STAGE_FOLDERS.items():
        path = checkpoint_folder(base) / folder / "metrics.json"
        if path.is_file():
            rows = [row for row in from_json(read_json(path)) if (row.protocol, row.split) == (protocol, "test")]
            if rows:
                results[stage] = sorted(rows, key=lambda row: row.context)
    return results


def baseline_results(protocol: str = "P5", split: str = "test", data: Path = DATA_FILE) -> dict[str, list[Result]]:
    """Results of the baselines, one a context, from the cache of their forecasts where it holds them."""
    dataset = load_dataset(data)
    codec = Codec(fit_scale(dataset.part("train")))
    results: dict[str, list[Result]] = {}
    for row in evaluate_baselines(dataset, codec, protocol, split=split, cache=BASELINE_CACHE):
        results.setdefault(row.model, []).append(row)
    return results


def results_table(results: Mapping[str, Sequence[Result]], reference: str | None = "untrained") -> pd.DataFrame:
    """One row a model and context: errors, interval, valid windows, change against a reference on windows both got valid.

    Parameters
    ----------
    results : mapping
        Label → results.
    reference : str, optional
        Label that changes are counted from.
    """
    before = {row.context: row for row in results.get(reference, [])} if reference else {}
    rows = []
    for label, measured in results.items():
        for result in measured:
            row = {"model": label, "protocol": result.protocol, "context": result.context}
            mse = "" if result.mse is None else f"{result.mse:.3g}"  # over a table, it spans several powers of ten
            row |= {"MAE": result.mae, "95 % interval": _interval(result), "MSE": mse, "RMSE": result.rmse}
            if result.mae_per_variable is not None and len(result.mae_per_variable) == 2:
                row |= dict(zip(("MAE prey", "MAE predator"), result.mae_per_variable, strict=True))
            row["valid"] = f"{result.n_valid} of {result.n}"
            against = before.get(result.context)
            if against is not None and against is not result and _comparable(result, against):
                change, low, high = paired_change(result, against)
                row[f"change against {reference}"] = f"{change:+.0f} % ({low:+.0f} to {high:+.0f})"
            rows.append(row)
    table = pd.DataFrame(rows)
    return table.astype({column: object for column in table if table[column].isna().any()}).fillna("")


def side_by_side(results: Mapping[str, Sequence[Result]], published: Sequence[str] = ()) -> pd.DataFrame:
    """P5 errors, mean absolute with its interval and mean squared, one row a model, and published Qwen rows beneath.

    Parameters
    ----------
    results : mapping
        Label → results.
    published : sequence of str
        Stages of `PUBLISHED` to set beside them.
    """
    table = {label: {f"S = {row.context}": _errors(row) for row in rows} for label, rows in results.items()}
    for stage in published:
        label = f"{stage}: {PUBLISHED_SOURCE}"
        table[label] = {f"S = {context}": f"{mae:.4f}; {mse:.3g}" for context, (mae, mse) in PUBLISHED[stage].items()}
    return pd.DataFrame(table).T.rename_axis("P5 MAE (95 % interval); MSE", axis=1)


def live_agreement(live: Sequence[Result], recorded: Sequence[Result], tolerance: float = 1e-3) -> pd.DataFrame:
    """Forecasts made now (`evaluate` with a `limit`) against the record of the same windows, one row a context.

    A window agrees when its two errors differ by at most `tolerance`, or when neither forecast is valid. Not all need
    to: where two digits are almost equally likely, another machine may write the other one.

    Raises
    ------
    UserError
        If the record is of other data.
    """
    rows = []
    for now in live:
        then = next(r for r in recorded if (r.protocol, r.context) == (now.protocol, now.context))
        if then.data_sha256 != now.data_sha256:
            raise UserError(
                f"the record ({then.protocol}, context {then.context}) is of other data than was loaded: "
                "evaluate again, or load the data it was measured on"
            )
        pairs = list(zip(now.window_mae, then.window_mae, strict=False))  # the first series come first in both
        both = np.array([pair for pair in pairs if None not in pair]).reshape(-1, 2)
        agree = int((np.abs(both[:, 0] - both[:, 1]) <= tolerance).sum()) + pairs.count((None, None))
        row = {"protocol": now.protocol, "context": now.context, "windows": now.n, "agree": agree}
        rows.append(row | {"MAE now": both[:, 0].mean(), "MAE recorded": both[:, 1].mean()})
    return pd.DataFrame(rows)


def _comparable(one: Result, other: Result) -> bool:
    """Whether there is a window that both got valid; that they are the same windows is for `paired_change` to ask."""
    return any(None not in pair for pair in zip(one.window_mae, other.window_mae, strict=False))


def verdict(change: tuple[float, float, float]) -> str:
    """A `paired_change` in words: an interval on one side of zero is a difference, any other is not."""
    _, low, high = change
    return "better" if high < 0 else "worse" if low > 0 else "no clear difference"


def extremes(result: Result) -> dict[str, int]:
    """Which windows have the smallest, the median and the largest error: ``best``, ``median``, ``worst`` → position."""
    valid = [(error, i) for i, error in enumerate(result.window_mae) if error is not None]
    order = [i for _, i in sorted(valid)]
    return {"best": order[0], "median": order[len(order) // 2], "worst": order[-1]}


def headline_table(base: str = "embedded") -> str:
    """The front page's table in Markdown: P5 error by stage and context, ours with intervals beside the published."""
    ours = stage_results(base)
    lines = markdown_header("P5 mean absolute error (population units)", *(f"S = {s}" for s in P5_CONTEXTS))
    for stage, rows in ours.items():
        cells = dict.fromkeys(P5_CONTEXTS, "–")  # not measured
        cells |= {r.context: NO_FORECAST if r.mae is None else f"**{r.mae:.4f}** ({_interval(r)})" for r in rows}
        lines.append(f"| {base} base, {stage} | {' | '.join(cells[s] for s in P5_CONTEXTS)} |")
    for stage, by_context in PUBLISHED.items():
        lines.append(
            f"| *{PUBLISHED_SOURCE}, {stage}* | {' | '.join(f'*{mae:.4f}*' for mae, _ in by_context.values())} |"
        )
    for name, rows in baseline_results().items():
        lines.append(f"| baseline: {name} | {' | '.join(f'{row.mae:.4f}' for row in rows)} |")
    return "\n".join([*lines, *_verdicts(ours), "", _provenance(base, ours)])


def _verdicts(ours: Mapping[str, Sequence[Result]]) -> list[str]:
    """Each stage against the untrained base in words, where they can be compared."""
    before = {row.context: row for row in ours.get("untrained", [])}
    verdicts = []
    for stage, rows in ours.items():
        known = all(row.context in before and _comparable(row, before[row.context]) for row in rows)
        if stage != "untrained" and known:
            pairs = [(row, verdict(paired_change(row, before[row.context]))) for row in rows]
            words = "; ".join(f"S = {row.context}, {word}" for row, word in pairs)
            verdicts.append(f"{stage.capitalize()} against untrained: {words}.")
    return ["", f"On the windows both got valid: {' '.join(verdicts)}"] if verdicts else []


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


def _errors(result: Result) -> str:
    """Both mean errors of a result in a cell."""
    interval = f" ({_interval(result)})" if result.ci_mae else ""
    return NO_FORECAST if result.mae is None else f"{result.mae:.4f}{interval}; {result.mse:.3g}"


def _interval(result: Result) -> str:
    return "" if result.ci_mae is None else f"{result.ci_mae[0]:.4f}–{result.ci_mae[1]:.4f}"
