"""The benchmark of sampling: both sides draw from one distribution."""

from collections import Counter

import numpy as np
import torch

from m2helpers.experiments.sampling import sample_by_transformers
from m2helpers.forecasting import generate, next_step
from m2helpers.text import Codec

CODEC, CONTEXT, N = Codec(1.0), "1.16,1.27;0.90,0.95;", 600


def test_both_sides_draw_the_first_number_alike(tiny_base):
    """Its first two characters, in 600 samples of each side, against their exact probabilities: chi-square, fixed seeds."""
    base = tiny_base()
    with torch.no_grad():
        base.model.lm_head.bias.fill_(-1000)
        base.model.lm_head.bias[15:25] = 0  # digits
        base.model.lm_head.bias[13] = 3  # and the point, which no grammar but ours bans from the first place
    exact = next_step(base, CODEC, CONTEXT, 2, cutoff=1e-4)
    starts = Counter()
    for value, mass in zip(exact.values[:, 0], exact.probabilities, strict=True):
        starts[f"{value:.2f}"[:2]] += mass
    ours = [g.text for g in generate(base, CODEC, [CONTEXT] * N, 1, 2, temperature=1.0, constrained=True, seed=1)]
    theirs = [text for text in sample_by_transformers(base, CONTEXT, 4 * N, 2, seed=2) if text[0] != "."][:N]
    theirs = ["0." if text[0] == "0" else text for text in theirs]  # as the grammar has it
    for drawn in (ours, theirs):
        assert len(drawn) == N
        seen = Counter(text[:2] for text in drawn)
        common = [start for start, mass in starts.items() if mass * N > 5]
        expected = N * np.array([*(starts[s] for s in common), 1 - sum(starts[s] for s in common)])
        found = np.array([*(seen[s] for s in common), N - sum(seen[s] for s in common)])
        assert ((found - expected) ** 2 / np.maximum(expected, 1e-9)).sum() < 3 * len(common) + 20
