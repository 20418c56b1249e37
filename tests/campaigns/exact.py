"""The exact distribution of the next step against 100,000 draws of the embedded base: run by hand, for it takes minutes.

python -m tests.campaigns.exact [SAMPLES]     (fails if they differ by more than chance does once in a million times)
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
from scipy.stats import chi2

from m2helpers.data import load_dataset
from m2helpers.evaluation.protocols import make_cases
from m2helpers.forecasting import generate
from m2helpers.forecasting.exact import next_step
from m2helpers.ledger import Ledger
from m2helpers.models import load_base
from m2helpers.text import Codec, fit_scale

SAMPLES, CONTEXT, EXPECTED, AT_ONCE = 100_000, 128, 10, 2000


def main() -> int:
    """Compare on two windows, one of them cut inside a step; return the exit status."""
    n = int(sys.argv[1]) if len(sys.argv) > 1 else SAMPLES
    base, dataset, failed = load_base("embedded"), load_dataset(), 0
    codec = Codec(fit_scale(dataset.part("train")))
    cases = make_cases(dataset.part("validation"), codec, "P5", CONTEXT)
    whole = cases[0].context.rpartition(codec.step_separator)[0] + codec.step_separator
    with tempfile.TemporaryDirectory() as folder:
        ledger = Ledger(Path(folder) / "ledger.sqlite")
        for context in (whole, cases[1].context):
            exact = next_step(base, codec, context, 2, ledger=ledger)
            start = context.rpartition(codec.step_separator)[2]
            drawn = generate(
                base, codec, [context] * n, 1, 2, temperature=1.0, constrained=True, batch_size=AT_ONCE, ledger=ledger
            )
            values = np.array([codec.decode(start + one.text, 2)[0][0] for one in drawn])  # (n, 2)
            failed += not _agree(exact.values, exact.probabilities, exact.pruned, values, codec.resolution)
    return 1 if failed else 0


def _agree(cells: np.ndarray, shares: np.ndarray, pruned: float, drawn: np.ndarray, width: float) -> bool:
    """Print Pearson's test of counts against shares; cells that expect few count together, with what was pruned."""
    n = len(drawn)
    places = {tuple(cell): i for i, cell in enumerate(np.rint(cells / width).astype(int).tolist())}
    which = [places.get(tuple(cell), len(cells)) for cell in np.rint(drawn / width).astype(int).tolist()]
    counts = np.bincount(which, minlength=len(cells) + 1)
    expected = n * np.append(shares, pruned)
    often = np.append(shares * n >= EXPECTED, False)
    seen, due = np.append(counts[often], counts[~often].sum()), np.append(expected[often], expected[~often].sum())
    statistic = float(((seen - due) ** 2 / due).sum())
    chance = float(chi2.sf(statistic, len(due) - 1))
    print(
        f"{n:,} draws, {len(cells):,} outcomes with {shares.sum():.6f} of the mass and {pruned:.6f} pruned, adding up to "
        f"{shares.sum() + pruned:.9f}; drawn among the pruned: {counts[-1] / n:.6f}; chi-squared {statistic:.1f} with {len(due) - 1} "
        f"degrees of freedom, p = {chance:.3f}; largest difference of a share {np.abs(counts / n - expected / n)[often].max():.5f}",
        flush=True,
    )
    return chance > 1e-6 and abs(shares.sum() + pruned - 1) < 1e-9


if __name__ == "__main__":
    sys.exit(main())
