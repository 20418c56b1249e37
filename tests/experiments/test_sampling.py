"""The benchmark of sampling: both sides draw from one distribution."""

from collections import Counter

import numpy as np
import pytest
import torch
from scipy.stats import chi2

from m2helpers.experiments.sampling import sample_by_transformers
from m2helpers.forecasting import generate, next_step
from m2helpers.text import Codec

CODEC, CONTEXT, N = Codec(1.0, precision=0, max_integer_digits=2), "12;90;3;", 800


@pytest.mark.slow
def test_both_sides_draw_the_same_numbers(tiny_base):
    """Whole numbers of two digits, in 800 samples of each side, against their exact probabilities: chi-square, fixed seeds."""
    base = tiny_base()
    with torch.no_grad():
        base.model.lm_head.bias.fill_(-1000)
        base.model.lm_head.bias[15:25] = 0  # digits
        base.model.lm_head.bias[26] = 3  # and the separator, without which theirs would write no end
    exact = next_step(base, CODEC, CONTEXT, 1, cutoff=1e-9)
    assert exact.pruned < 1e-6
    masses = {f"{value:.0f};"[:2]: mass for value, mass in zip(exact.values[:, 0], exact.probabilities, strict=True)}
    ours = [g.text for g in generate(base, CODEC, [CONTEXT] * N, 1, 1, temperature=1.0, constrained=True, seed=1)]
    theirs = [text for text in sample_by_transformers(base, CONTEXT, 4 * N, 2, seed=2) if text[0] != ";"][:N]
    theirs = ["0;" if text[0] == "0" else text for text in theirs]  # as the grammar has it
    common = [start for start, mass in masses.items() if mass * N > 5]
    assert len(common) >= 15
    for drawn in (ours, theirs):
        assert len(drawn) == N
        seen = Counter(text[:2] for text in drawn)
        expected = N * np.array([*(masses[s] for s in common), 1 - sum(masses[s] for s in common)])
        found = np.array([*(seen[s] for s in common), N - sum(seen[s] for s in common)])
        assert ((found - expected) ** 2 / expected).sum() < chi2.ppf(0.999, len(common))
