"""The command that forecasts a user's own series."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from ..files import UserError, atomic_path
from ..settings import default_model
from .options import Adapter, BaseOrRun, File, Flag, InputFile, RunOrBase, load_target

if TYPE_CHECKING:
    import numpy as np

    from ..runs import Run
    from ..text import Codec


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """Forecast your own series, from CSV or HDF5."""

    file: InputFile
    """CSV, a column a variable; or HDF5, in the layout of the shipped data."""
    steps: int
    """Steps ahead."""
    samples: int = 0
    """Forecasts drawn at random for each series; 0: the likeliest one."""
    out: File
    """CSV to write."""
    scale: Literal["own", "run"] = "own"
    """By each series itself, or as the run has it."""
    constrained: Flag = False
    """Write only what the grammar allows: all forecasts parse."""
    seed: int = 0
    """Seed of the samples."""
    model: BaseOrRun = field(default_factory=default_model)
    run: RunOrBase = None
    adapter: Adapter = None

    def __call__(self) -> None:
        import numpy as np
        import pandas as pd

        from ..forecasting import forecast, sample_forecasts
        from ..ledger import default_ledger
        from ..series import read_series

        base, run, constrained = load_target(self.model, self.run, self.adapter, self.constrained)
        series = read_series(self.file)
        codecs = self._codecs(series, run)  # all of them before the first forecast
        rows, invalid, ledger = [], 0, default_ledger(base)  # opened once
        for index, (values, codec) in enumerate(zip(series, codecs, strict=True)):
            if self.samples:
                how = dict(seed=self.seed, constrained=constrained, ledger=ledger)
                drawn = sample_forecasts(base, codec, values, self.steps, self.samples, **how)
                invalid += self.samples - len(drawn)
            else:
                (likeliest,) = forecast(base, codec, [values], self.steps, constrained=constrained, ledger=ledger)
                drawn = likeliest.values[np.newaxis]
                invalid += len(drawn[0]) < self.steps
            for sample, path in enumerate(drawn):
                for step, point in enumerate(path):
                    rows.append([index, sample, step + 1, *(float(f"{x:.9g}") for x in point)])
        names = [f"variable_{i}" for i in range(series.shape[2])]
        with atomic_path(self.out) as temporary:
            pd.DataFrame(rows, columns=["series", "sample", "step", *names]).to_csv(temporary, index=False)
        print(
            f"{self.out}: {len(series)} series, {self.steps} steps ahead"
            + (f"; {invalid} did not parse whole: with --constrained all do" if invalid else "")
        )

    def _codecs(self, series: np.ndarray, run: Run | None) -> list[Codec]:
        """The codec of each series: with its own scale, or the run's."""
        from ..text import Codec, fit_scale

        if self.scale == "run":
            if run is None:
                raise UserError("--scale run: an untrained model has no scale; give --run, or leave --scale out")
            return [run.codec] * len(series)
        codecs = []
        for index, values in enumerate(series):
            try:
                codecs.append(Codec(fit_scale(values), run.codec.precision if run else 2))
            except UserError as error:
                raise UserError(f"{self.file}, series {index}: {error}") from None
        return codecs
