"""The instructions that are shipped: questions about our own series whose answers a reader can check by eye.

Four kinds, in equal shares. What is asked about is what is written: a maximum is one of the numbers in the text, and an answer
is right or wrong whatever digits rounding took away. Rows for validation come from series that no training row is about.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ..data import Dataset
from ..files import write_text
from ..text import Codec, fit_scale
from .rows import Row

STEPS, EVERY = 8, 3  # a row shows so many steps, of the series every third
PRECISION = 1  # decimals: short texts, and answers that can be met exactly
ROWS = {"train": 240, "validation": 60}
FILES = {"train": "train.jsonl", "validation": "val.jsonl"}
_SEED = 20261130
_TRIES = 1000  # windows looked at for one that a question fits

Answer = Callable[[np.ndarray, bool], str | None]
"""Numbers as written, (STEPS + 1, 2), and for questions with two answers which one is wanted → the answer; None if it does not fit."""


def _next(steps: np.ndarray, first: bool) -> str | None:
    return ",".join(f"{value:.{PRECISION}f}" for value in steps[-1])


def _largest(steps: np.ndarray, first: bool) -> str | None:
    shown = np.sort(steps[:-1].ravel())
    return f"{shown[-1]:.{PRECISION}f}" if shown[-1] > shown[-2] else None


def _peaks_first(steps: np.ndarray, first: bool) -> str | None:
    shown = steps[:-1]
    at = shown.argmax(axis=0)  # (2,)
    inside = (at > 0).all() and (at < STEPS - 1).all()
    return ("1" if first else "2") if inside and at[0] != at[1] and (at[0] < at[1]) == first else None


def _dies_out(steps: np.ndarray, first: bool) -> str | None:
    return ("1" if first else "0") if (steps[-2, 1] == 0) == first else None


QUESTIONS: dict[str, Answer] = {
    "What comes next?": _next,
    "What is the largest number?": _largest,
    "Which peaks first, 1 prey or 2 predator?": _peaks_first,
    "Is the predator gone at the end, 1 yes or 0 no?": _dies_out,
}
"""Instruction → what answers it."""


def draw_rows(dataset: Dataset, part: str, n: int) -> list[Row]:
    """Rows about the series of one part of a dataset, the kinds in turn; the same ones every time.

    Parameters
    ----------
    dataset : Dataset
    part : {"train", "validation"}
    n : int
        How many.
    """
    codec, series = Codec(fit_scale(dataset.part("train")), PRECISION), dataset.part(part)
    rng = np.random.default_rng([_SEED, sorted(ROWS).index(part)])
    kinds = list(QUESTIONS.items())
    rows = [_draw_row(rng, series, codec, *kinds[i % len(kinds)], i // len(kinds) % 2 == 0) for i in range(n)]
    return [rows[i] for i in rng.permutation(n)]


def _draw_row(
    rng: np.random.Generator, series: np.ndarray, codec: Codec, question: str, answer: Answer, first: bool
) -> Row:
    for _ in range(_TRIES):
        x = series[rng.integers(len(series))].astype(np.float64)
        start = rng.integers(len(x) - STEPS * EVERY)
        window = x[start::EVERY][: STEPS + 1]  # (STEPS + 1, 2)
        if (output := answer(np.round(window * codec.scale, PRECISION), first)) is not None:
            return Row(question, codec.encode(window[:-1]), output)
    raise RuntimeError(f"no window of {len(series)} series fits {question!r}")


def write_questions(dataset: Dataset, folder: Path) -> None:
    """Write ``train.jsonl`` and ``val.jsonl``, a row a line: always the same bytes for the same data."""
    for part, n in ROWS.items():
        lines = [json.dumps(row._asdict()) + "\n" for row in draw_rows(dataset, part, n)]
        write_text(Path(folder) / FILES[part], "".join(lines))
