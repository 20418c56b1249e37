"""Evaluation protocols: what is forecast, what it is compared with, and how sure the figures are.

P5
    For each context length S, windows of S tokens start every 256 tokens of each series' text, even inside a number.
    Decoding goes on until the 6th ``;``; the five steps between the 1st and the 6th are compared with the truth.
L50, L20
    50 steps in and 50 out; 80 in and 20 out, whole steps.

In P5 the truth is the text itself, rounded as a model's forecast is, so every other forecast is rounded like it before the two
are compared (`measure`); each window carries its future as stored beside it. In L50 and L20 the truth is the stored series.

Errors are in the units of the series. Forecasts that do not parse are counted and shown, never filled in.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..files import UserError
from ..text import Codec

P5_STRIDE = 256
P5_STEPS = 5
P5_CONTEXTS = (128, 512, 768)
HORIZONS = {"L50": (50, 50), "L20": (80, 20)}
PROTOCOLS = ("P5", *HORIZONS)


@dataclass(frozen=True)
class Case:
    """One forecast to be made and the truth it is compared with."""

    series: int
    """Index in its split."""
    start: int
    """Token of the series at which the context begins."""
    context: str
    """Encoded text the model sees."""
    truth: np.ndarray
    """(steps compared, variables), in the units of the series."""
    skip: int
    """Separators the model writes before the compared steps begin: 1 in P5, where a context can end inside a step."""
    unrounded: np.ndarray | None = None
    """The same future as stored, where `truth` is rounded text (P5); None where they are one."""

    @property
    def stored(self) -> np.ndarray:
        """The future as stored, (steps compared, variables)."""
        return self.truth if self.unrounded is None else self.unrounded

    @property
    def steps(self) -> int:
        """Separators to write in all."""
        return self.skip + len(self.truth)


def make_cases(trajectories: np.ndarray, codec: Codec, protocol: str, context: int | None = None) -> list[Case]:
    """The forecasts a protocol asks for.

    Parameters
    ----------
    trajectories : (n_series, n_steps, n_variables)
    protocol : {"P5", "L50", "L20"}
    context : int, optional
        Tokens of context; P5 only.

    Raises
    ------
    UserError
        If the protocol is unknown, the series are too short for it, or the context is.
    """
    if protocol == "P5":
        if context is None:
            raise UserError("protocol P5: give a context, in tokens")
        cases = [case for i, values in enumerate(trajectories) for case in _p5_cases(i, values, codec, context)]
    elif protocol in HORIZONS:
        known, ahead = HORIZONS[protocol]
        cases = [
            Case(i, 0, codec.encode(v[:known]), v[known : known + ahead].astype(float), 0)
            for i, v in enumerate(trajectories)
        ]
        cases = [case for case in cases if len(case.truth) == ahead]
    else:
        raise UserError(f"protocol {protocol!r}: choose from {', '.join(PROTOCOLS)}")
    if not cases:
        raise UserError(
            f"protocol {protocol}: series of {trajectories.shape[1]} steps are too short for context {context}; "
            "use longer ones, or P5 with a shorter context"
        )
    if any(case.context.count(codec.step_separator) <= min(case.start, 1) for case in cases):
        raise UserError(f"protocol {protocol}: a window of {context} tokens holds no whole step; use a longer context")
    return cases


def _p5_cases(index: int, values: np.ndarray, codec: Codec, context: int) -> list[Case]:
    text, n_variables = codec.encode(values), values.shape[1]
    steps = P5_STEPS + 1
    cases = []
    for start in range(0, len(text) - context, P5_STRIDE):
        rest = text[start + context :]
        if len(rest) < steps * codec.shortest_step(n_variables) or rest.count(codec.step_separator) < steps:
            break
        truth = compared(codec, rest, 1, n_variables)[:P5_STEPS]
        first = text.count(codec.step_separator, 0, start + context) + 1  # after the step that the context ends in
        stored = values[first : first + P5_STEPS].astype(float)
        cases.append(Case(index, start, text[start : start + context], truth, 1, stored))
    return cases


def compared(codec: Codec, text: str, skip: int, n_variables: int) -> np.ndarray:
    """Values of the whole steps after the first `skip` separators of a text, (steps, variables)."""
    for _ in range(skip):
        text = text.partition(codec.step_separator)[2]
    return codec.decode(text, n_variables).values


def numeric_context(codec: Codec, case: Case, n_variables: int) -> np.ndarray:
    """The whole steps of a context, (steps, variables): one that begins inside a series may begin inside a number."""
    return compared(codec, case.context, min(case.start, 1), n_variables)
