"""Distributions computed on the cache: against whole forward passes, against enumeration, and against samples."""

from collections import Counter

import numpy as np
import pytest
import torch

from m2helpers.files import UserError
from m2helpers.flops.account import generation_flops
from m2helpers.forecasting import generate, next_step, predictive_distributions, reading
from m2helpers.ledger import default_ledger
from m2helpers.text import Codec, Grammar

SHORT = Codec(1.0, precision=1, max_integer_digits=1)  # 200 numbers: few enough to enumerate
WHOLE = Codec(1.0, precision=0, max_integer_digits=1)  # 20
CONTEXT = "1.2,3.4;5.6,7.8;"


@pytest.fixture
def base(tiny_base):
    """A tiny base that seldom writes a minus: its numbers are not all alike improbable."""
    base = tiny_base()
    with torch.no_grad():
        base.model.lm_head.bias[12] = -3
    return base


@torch.no_grad()
def _probability(base, codec, context, text, n_variables, temperature=1.0):
    """Of writing a text, one whole forward pass a character, with softmaxes over what the grammar allows."""
    grammar, product = Grammar(codec, n_variables), 1.0
    for i, character in enumerate(text):
        ids = base.tokenizer(context + text[:i])["input_ids"]
        state = grammar.walk(context + text[:i])
        allowed = [c for c, after in zip(codec.alphabet, grammar.next[state], strict=True) if after >= 0]
        logits = base.model(torch.tensor([ids])).logits[0, -1][[base.tokenizer(c)["input_ids"][0] for c in allowed]]
        product *= float((logits.double() / temperature).softmax(-1)[allowed.index(character)])
    return product


@pytest.mark.parametrize(
    ("context", "tail"), [(CONTEXT, ""), (CONTEXT + "4.4,", "4.4,"), (CONTEXT + "4.4,1.", "4.4,1.")]
)
def test_probabilities_are_products_of_softmaxes(context, tail, base):
    """Also where the context ends inside a step, or inside a number."""
    found = next_step(base, SHORT, context, 2, temperature=0.7, cutoff=1e-3)
    assert found.probabilities.sum() == pytest.approx(1 - found.pruned, abs=1e-9) and 0 <= found.pruned < 1
    assert (found.probabilities >= 1e-3 * (1 - 1e-9)).all() and len(found.values) == len(
        np.unique(found.values, axis=0)
    )
    for place in np.random.default_rng(0).choice(len(found.values), min(6, len(found.values)), replace=False):
        text = SHORT.encode(found.values[[place]])
        assert text.startswith(tail)
        wanted = _probability(base, SHORT, context, text[len(tail) :], 2, 0.7)
        assert found.probabilities[place] == pytest.approx(wanted, rel=1e-4)


def test_nothing_is_lost_but_what_is_pruned(base):
    """All 199 numbers (−0.0 and 0.0 are two texts of one): their probabilities add up to 1, each computed by itself."""
    found = next_step(base, SHORT, "1.2;3.4;", 1, cutoff=1e-12)
    assert len(found.values) == 199 and found.probabilities.sum() == pytest.approx(1, abs=1e-6) and found.pruned < 1e-6
    coarse = next_step(base, SHORT, "1.2;3.4;", 1, cutoff=0.01)
    kept = found.probabilities >= 0.01
    assert coarse.pruned == pytest.approx(1 - found.probabilities[kept].sum(), abs=3e-5) and 0.01 < coarse.pruned < 0.9
    np.testing.assert_allclose(
        np.sort(coarse.probabilities), np.sort(found.probabilities[kept]), rtol=1e-3
    )  # -0.0 is pruned


@pytest.mark.slow
def test_the_sampler_draws_from_it(base):
    """Chi-square of 2,000 samples in at most 30 classes, and one for what is pruned or rare."""
    n, context = 2000, "1.2;3.4;"
    found = next_step(base, SHORT, context, 1, cutoff=1e-3)
    drawn = generate(base, SHORT, [context] * n, 1, 1, temperature=1.0, constrained=True, batch_size=1000)
    counts = Counter(float(g.text[:-1]) for g in drawn)
    order = found.probabilities.argsort()[::-1][:30]
    expected = n * np.append(found.probabilities[order], 1 - found.probabilities[order].sum())
    seen = np.array([counts[v] for v in found.values[order, 0].tolist()])
    seen = np.append(seen, n - seen.sum())
    assert ((seen - expected) ** 2 / expected).sum() < 59.7  # of 30 degrees: 0.1 %


# ---------------------------------------------------------------- mixtures


def _two_steps(base, context):
    """Enumerated: each first number, and each second after it; a dictionary of cells for each step."""
    first = next_step(base, WHOLE, context, 1, cutoff=1e-12)
    steps = [Counter(), Counter()]
    for value, mass in zip(first.values[:, 0], first.probabilities, strict=True):
        steps[0][int(value)] += mass
        second = next_step(base, WHOLE, context + WHOLE.encode([[value]]), 1, cutoff=1e-12)
        for other, share in zip(second.values[:, 0], second.probabilities, strict=True):
            steps[1][int(other)] += mass * share
    return steps


def _masses(distribution, step):
    pairs = zip(distribution.cells[step, 0].tolist(), distribution.mass[step, 0].tolist(), strict=True)
    return {cell: mass for cell, mass in pairs if mass > 0}


@pytest.mark.slow
def test_with_paths_enough_a_mixture_is_exact(base):
    context = "1;3;"
    (made,) = predictive_distributions(base, WHOLE, [context], 2, 1, n_paths=100, cutoff=1e-12)
    for step, wanted in enumerate(_two_steps(base, context)):
        assert _masses(made, step) == pytest.approx({c: m for c, m in wanted.items() if m > 0}, abs=3e-5)
    assert made.pruned.max() < 1e-6


@pytest.mark.slow
def test_few_paths_are_right_on_average(base):
    """Three paths of twenty, and thinned: the first step is exact whatever the seed, the second's mean over seeds is."""
    context, n = "1;3;", 40
    first, second = _two_steps(base, context)
    total = Counter()
    for seed in range(n):
        (made,) = predictive_distributions(base, WHOLE, [context], 2, 1, n_paths=3, cutoff=3e-3, seed=seed)
        assert _masses(made, 0) == pytest.approx({c: m for c, m in first.items() if m >= 3e-3}, rel=0.1)
        total.update(_masses(made, 1))
    mean = np.array([total[cell] / n for cell in second])
    assert np.abs(mean - list(second.values())).sum() < 0.12, (
        mean
    )  # total variation of 0.06; of one seed it is about 0.3


@pytest.mark.slow
def test_a_contexts_distribution_knows_nothing_of_the_call(base):
    contexts = [CONTEXT, "0.1,9.9;5.0,2.2;4.", CONTEXT + "1.", "0.1,9.9;5.0,2.2;4.1,", "3.3,3.3;"]
    how = dict(n_paths=4, cutoff=2e-3, seed=5)
    together = predictive_distributions(base, SHORT, contexts, 2, 2, **how)
    for context, one in zip(contexts, together, strict=True):
        (alone,) = predictive_distributions(base, SHORT, [context], 2, 2, **how)
        np.testing.assert_array_equal(alone.cells, one.cells)
        np.testing.assert_allclose(alone.mass, one.mass, rtol=1e-3)
    known = together[3]  # 4.1 stands there
    assert known.mean[0, 0] == pytest.approx(4.1) and known.quantile([0, 1])[:, 0, 0] == pytest.approx([4.05, 4.15])


def test_its_first_step_is_the_next_step(base):
    found = next_step(base, SHORT, CONTEXT, 2, temperature=0.8, cutoff=1e-6)
    how = dict(temperature=[0.8, 2.0], n_paths=2, cutoff=1e-6)
    (made,) = predictive_distributions(base, SHORT, [CONTEXT], 2, 2, **how)
    mean = (found.values * found.probabilities[:, np.newaxis]).sum(0) / found.probabilities.sum()
    assert made.mean[0, 1] == pytest.approx(mean[1], rel=1e-6) and made.mean[0, 0] == pytest.approx(mean[0], abs=0.05)
    assert made.pruned[0] == pytest.approx(found.pruned, rel=1e-6)


@pytest.mark.slow
def test_a_first_step_too_wide_to_be_pruned_is_right_on_average(base):
    """Pruned at 5e-3 the second number would lose much; thinned, it loses nothing."""
    assert next_step(base, SHORT, CONTEXT, 2, cutoff=5e-3).pruned > 0.05
    exact = next_step(base, SHORT, CONTEXT, 2, cutoff=1e-6)
    wanted = (exact.values * exact.probabilities[:, np.newaxis]).sum(0)
    how = dict(n_paths=20, cutoff=5e-3)
    made = [predictive_distributions(base, SHORT, [CONTEXT], 1, 2, seed=seed, **how)[0] for seed in range(30)]
    assert np.mean([one.mean[0] for one in made], axis=0) == pytest.approx(wanted, rel=0.04)
    assert max(one.pruned.max() for one in made) < 0.01


def test_a_colder_step_is_narrower(base):
    for cold in (0, 1):
        how = [0.3 if step == cold else 1.0 for step in range(2)]
        (made,) = predictive_distributions(base, SHORT, ["1.2;3.4;"], 2, 1, temperature=how, cutoff=1e-6)
        low, high = made.quantile([0.1, 0.9])[:, :, 0]
        assert (high - low)[cold] < (high - low)[1 - cold]


# ---------------------------------------------------------------- cost and refusals


def test_every_token_is_billed(base, monkeypatch):
    read, wanted, before = [], reading._read, default_ledger(base).spent()

    def noted(model, cache, ids, mask, *rest):
        past = cache.get_seq_length()
        read.append((*ids.shape, past))
        return wanted(model, cache, ids, mask, *rest)

    monkeypatch.setattr(reading, "_read", noted)
    contexts = [CONTEXT, CONTEXT.replace("7", "2"), CONTEXT]
    predictive_distributions(base, SHORT, contexts, 2, 2, n_paths=3, cutoff=5e-3)
    prompt, how = len(CONTEXT), dict(vocabulary=len(SHORT.alphabet))
    config = base.model.config

    def upto(n):
        return generation_flops(config, 1, prompt, n + 1, **how)

    first, *later = read
    assert first == (2, prompt, 0)  # two prompts, once each
    expected = 2 * upto(0) + sum(rows * (upto(past + new) - upto(past)) for rows, new, past in later)
    assert default_ledger(base).spent() - before == expected


def test_what_cannot_be_computed_is_refused(base):
    with pytest.raises(UserError, match=r"the context '1.2' holds no ';': give at least one whole step"):
        next_step(base, SHORT, "1.2", 1)
    with pytest.raises(UserError, match=r"cutoff 0.5: give a share of the mass above 0 and at most 0.01"):
        next_step(base, SHORT, CONTEXT, 2, cutoff=0.5)
    with pytest.raises(UserError, match=r"0 paths at temperature 1.0: ask for at least 1, and more than 0"):
        predictive_distributions(base, SHORT, [CONTEXT], 2, 2, n_paths=0)
    with pytest.raises(UserError, match=r"temperature 0"):
        predictive_distributions(base, SHORT, [CONTEXT], 2, 2, temperature=0)
    with torch.no_grad():
        base.model.model.layers[1].mlp.down_proj.weight[3] = torch.nan
    with pytest.raises(UserError, match="not a number: its weights are damaged"):
        next_step(base, SHORT, CONTEXT, 2)
