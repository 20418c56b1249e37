"""Sampled forecasts of a protocol's windows as distributions, and their calibration on validation series."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from tqdm.auto import tqdm

from ..forecasting.distribution import Distribution
from ..forecasting.generation import generate
from ..ledger import Ledger
from ..models import Base
from ..settings import LoraSettings
from ..text import Codec
from .protocols import Case, compared

SAMPLES = 20
_AT_ONCE = 10  # windows: their samples make one batch


@dataclass(frozen=True)
class Drawn:
    """What was drawn for some windows."""

    distributions: list[Distribution]
    """Of the steps that are compared, one a window."""
    flops: int


def draw(
    base: Base,
    codec: Codec,
    cases: Sequence[Case],
    samples: int = SAMPLES,
    *,
    lora: LoraSettings | None = None,
    constrained: bool = False,
    ledger: Ledger | None = None,
) -> Drawn:
    """Sample each window's future, at temperature 1, and take the paths' cells as its distribution.

    A path counts at each step that it reached; what it wrote after its first mistake is not read.
    """
    distributions, flops = list[Distribution](), 0
    n_variables = cases[0].truth.shape[1]
    for first in tqdm(range(0, len(cases), _AT_ONCE), desc=f"{samples} samples", unit="batch", leave=False):
        some = cases[first : first + _AT_ONCE]
        written = generate(
            base, codec, [c.context for c in some for _ in range(samples)], some[0].steps, n_variables,
            batch_size=_AT_ONCE * samples, temperature=1.0, lora=lora, constrained=constrained, ledger=ledger,
        )  # fmt: skip
        flops += sum(out.flops for out in written)
        for i, case in enumerate(some):
            paths = np.full((samples, *case.truth.shape), np.nan)
            for path, out in zip(paths, written[i * samples : (i + 1) * samples], strict=True):
                values = compared(codec, out.text, case.skip, n_variables)[: len(path)]
                path[: len(values)] = values
            distributions.append(Distribution.from_paths(paths, codec.resolution))
    return Drawn(distributions, flops)
