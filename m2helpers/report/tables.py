"""Results by stage from the records, and the published figures beside them, as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from ..data import Dataset, load_dataset
from ..evaluation.measure import evaluate_baselines
from ..evaluation.scores import LATER, Result, from_json, paired_change
from ..experiments.planning import stage_label as stage_label
from ..files import UserError, read_json
from ..paths import BASELINE_CACHE, DATA_FILE, checkpoint_folder
from ..settings import EMBEDDED, default_model
from ..text import Codec, fit_scale
from .findings import NO_FORECAST, figure, markdown_header

SCORES_NAME = "scores.json"
STAGE_FOLDERS = {"untrained": "base", "initial": "initial", "final": "final", "extended": "extended"}

# Qwen2.5-0.5B-Instruct on the course's own data file: P5 (MAE, MSE) by context, as printed in the README of a write-up of the
# course this project follows. They were not measured here and stand apart from our rows, for comparison only.
PUBLISHED_SOURCE = "Qwen2.5-0.5B, published (course's file, not run here)"
PUBLISHED_TITLE = "M2 Coursework – Time Series Forecasting with Qwen 0.5B LoRA"
PUBLISHED_LINK = (
    "https://wandb.ai/ym429-university-of-cambridge/M2-TimeSeriesForecasting-Sweep/reports/"
    "M2-Coursework-Time-Series-Forecasting-with-Qwen-0-5B-LoRA--VmlldzoxMjE0MTczOQ"
)  # the log of its runs, which its README points to
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

    What ``metrics.json`` does not hold of later scores is read from ``scores.json`` beside it, a second measurement of the same run.
    """
    results = {}
    for stage, folder in STAGE_FOLDERS.items():
        first, again = (
            [
                row
                for row in _records(checkpoint_folder(base) / folder / name)
                if (row.protocol, row.split) == (protocol, "test")
            ]
            for name in ("metrics.json", SCORES_NAME)
        )
        if first:
            results[stage] = sorted((_completed(row, again) for row in first), key=lambda row: row.context)
    return results


def _records(path: Path) -> list[Result]:
    return from_json(read_json(path)) if path.is_file() else []


def _completed(row: Result, again: Sequence[Result]) -> Result:
    """A recorded row with the scores of a second measurement that it has none of; its own figures stay."""
    about = ("context", "precision", "series", "data_sha256", "base_sha256")
    for other in again:
        if all(getattr(row, name) == getattr(other, name) for name in about):
            missing = {name: getattr(other, name) for name in LATER if getattr(row, name) is None}
            return replace(row, **missing)
    return row


def baseline_results(protocol: str = "P5", split: str = "test", data: Path = DATA_FILE) -> dict[str, list[Result]]:
    """Results of the baselines, one a context, from the cache of their forecasts where it holds them."""
    results: dict[str, list[Result]] = {}
    for row in evaluate_baselines(*shipped_data(data), protocol, split=split, cache=BASELINE_CACHE):
        results.setdefault(row.model, []).append(row)
    return results


def shipped_data(data: Path = DATA_FILE) -> tuple[Dataset, Codec]:
    """The dataset, and the text that its training split asks for."""
    dataset = load_dataset(data)
    return dataset, Codec(fit_scale(dataset.part("train")))


def results_table(results: Mapping[str, Sequence[Result]], reference: str | None = "untrained") -> pd.DataFrame:
    """One row a model and context: errors, interval, valid windows, change against a reference on windows both got valid.

    ``MAE`` is on equal terms; ``MAE as stored``, where it is known, is against the numbers before they became text.

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
            row = {"model": stage_label(label), "protocol": result.protocol, "context": result.context}
            mse = "" if result.mse is None else f"{result.mse:.3g}"  # over a table, it spans several powers of ten
            row |= {"MAE": result.mae, "95 % interval": interval(result), "MSE": mse, "RMSE": result.rmse}
            if result.mae_per_variable is not None and len(result.mae_per_variable) == 2:
                row |= dict(zip(("MAE prey", "MAE predator"), result.mae_per_variable, strict=True))
            if result.against_stored is not None:
                row["MAE as stored"] = result.against_stored.mae
            row["valid"] = f"{result.n_valid} of {result.n}"
            against = before.get(result.context)
            if reference and against is not None and against is not result and comparable(result, against):
                change, low, high = paired_change(result, against)
                row[f"change against {stage_label(reference)}"] = f"{change:+.0f} % ({low:+.0f} to {high:+.0f})"
            rows.append(row)
    table = pd.DataFrame(rows)
    return table.astype({column: object for column in table if table[column].isna().any()}).fillna("")


def side_by_side(results: Mapping[str, Sequence[Result]], published: Sequence[str] = ()) -> pd.DataFrame:
    """P5 errors, one row a model, and published Qwen rows beneath; at each context mean absolute, with its interval, and mean squared.

    Parameters
    ----------
    results : mapping
        Label → results.
    published : sequence of str
        Stages of `PUBLISHED` to set beside them.
    """
    table: dict[str, dict[tuple[str, str], str]] = {}
    for label, rows in results.items():
        cells = {row.context: _errors(row) for row in rows}
        table[stage_label(label)] = _by_context(cells)
    for stage in published:
        cells = {context: (f"{mae:.4f}", figure(mse, 3)) for context, (mae, mse) in PUBLISHED[stage].items()}
        table[f"{stage_label(stage)}: {PUBLISHED_SOURCE}"] = _by_context(cells)
    return pd.DataFrame(table).T.rename_axis(["P5", ""], axis=1)


def _by_context(cells: Mapping[int, tuple[str, str]]) -> dict[tuple[str, str], str]:
    names = ("MAE (95 % interval)", "MSE")
    return {(f"S = {s}", name): cell for s, pair in cells.items() for name, cell in zip(names, pair, strict=True)}


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


def comparable(one: Result, other: Result) -> bool:
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


def published_table(stages: Sequence[str] = tuple(PUBLISHED)) -> str:
    """The published P5 figures of Qwen2.5-0.5B in Markdown, with their source: mean absolute and mean squared error."""
    contexts = list(next(iter(PUBLISHED.values())))
    names = [f"{error}, S = {s}" for error in ("MAE", "MSE") for s in contexts]
    lines = markdown_header("P5, Qwen2.5-0.5B, published", *names)
    for stage in stages:
        maes, mses = zip(*PUBLISHED[stage].values(), strict=True)
        cells = [*(f"*{mae:.4f}*" for mae in maes), *(f"*{figure(mse, 3)}*" for mse in mses)]
        lines.append(f"| *{stage_label(stage)}* | {' | '.join(cells)} |")
    said = (
        "Measured by others on the course's own data file and **not run here**: figures as printed in the README of the write-up whose runs are "
        f"logged as [{PUBLISHED_TITLE}]({PUBLISHED_LINK})."
    )
    return "\n".join([said, "", *lines])


def interval(result: Result) -> str:
    """The 95 % interval of a result's mean absolute error, low–high; empty where there is none."""
    return "" if result.ci_mae is None else f"{result.ci_mae[0]:.4f}–{result.ci_mae[1]:.4f}"


def _errors(result: Result) -> tuple[str, str]:
    """Both mean errors of a result, the first with its interval."""
    if result.mae is None or result.mse is None:
        return NO_FORECAST, ""
    return f"{result.mae:.4f}" + (f" ({interval(result)})" if result.ci_mae else ""), figure(result.mse, 3)
