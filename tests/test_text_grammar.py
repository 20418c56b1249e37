"""The grammar of text as an automaton, and decoding that keeps to it."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from m2helpers.files import UserError
from m2helpers.forecasting import forecast, generate
from m2helpers.text import Codec, Grammar, tokenise

codecs = st.builds(
    Codec, st.just(1.0), precision=st.integers(0, 3), max_integer_digits=st.integers(1, 3)
) | st.just(Codec(1.0, variable_separator=" ", step_separator="|"))  # fmt: skip


@given(codecs, st.integers(1, 3), st.integers(0, 2**32), st.data())
def test_every_stretch_of_encoded_text_is_in_the_grammar(codec, n_variables, seed, data):
    limit = 10**codec.max_integer_digits - 1
    values = np.random.default_rng(seed).uniform(-limit, limit, (8, n_variables)).round(codec.precision)
    text = codec.encode(values)
    start = data.draw(st.integers(0, len(text) - 1))
    stop = data.draw(st.integers(start + 1, len(text)))
    Grammar(codec, n_variables).walk(text[start:stop])


@given(codecs, st.integers(1, 3), st.integers(0, 2**32))
def test_whatever_the_grammar_allows_parses(codec, n_variables, seed):
    """Random walks: after the first separator, whole steps and nothing else."""
    grammar, draw = Grammar(codec, n_variables), np.random.default_rng(seed)
    state, text = 0, ""
    while text.count(codec.step_separator) < 6:
        allowed = np.flatnonzero(grammar.next[state] >= 0)
        assert len(allowed), "a dead end"
        choice = int(draw.choice(allowed))
        assert grammar.forced[state] == (choice if len(allowed) == 1 else -1)
        state, text = int(grammar.next[state, choice]), text + grammar.alphabet[choice]
    whole = text.partition(codec.step_separator)[2]
    values, stop = codec.decode(whole, n_variables)
    assert stop == len(whole) and len(values) == 5


@given(st.integers(1, 3), st.text("0123456789.-,;", min_size=1, max_size=12))
def test_what_does_not_parse_is_not_allowed(n_variables, text):
    """After a step separator the automaton and the strict decoder agree on every text that ends a step."""
    codec = Codec(1.0)
    grammar, text = Grammar(codec, n_variables), text + ";"
    first = grammar.walk("0.00," * (n_variables - 1) + "0.00;")
    try:
        grammar.walk(text, first)
    except UserError:
        assert codec.decode(text, n_variables).stop < len(text)
    else:
        assert codec.decode(text, n_variables).stop == len(text)


@pytest.mark.parametrize("text", ["1.234", "1.23;4.56;", "abc", "1.23,4.56,7.89,", "--1", "1.23;01.00,"])
def test_a_context_that_breaks_the_grammar_is_refused(text):
    with pytest.raises(UserError, match="a context breaks the grammar at character"):
        Grammar(Codec(1.0), 2).walk(text)


def test_separators_and_points_are_often_forced():
    grammar = Grammar(Codec(1.0), 2)
    forced = {
        text: grammar.forced[grammar.walk("1.00,2.00;" + text)]
        for text in ("0", "12", "123", "1.2", "1.23", "1.23,4.56")
    }
    shown = {text: grammar.alphabet[i] if i >= 0 else "" for text, i in forced.items()}
    assert shown == {"0": ".", "12": "", "123": ".", "1.2": "", "1.23": ",", "1.23,4.56": ";"}


# ---------------------------------------------------------------- decoding


def _one_by_one(base, codec, context, n_steps, n_variables):
    """Greedy constrained decoding as one would write it down: a whole forward pass for each character, no cache."""
    grammar, text = Grammar(codec, n_variables), context
    tokens = np.concatenate(tokenise(list(grammar.alphabet), base.tokenizer))
    while text[len(context) :].count(codec.step_separator) < n_steps:
        logits = base.model(torch.from_numpy(tokenise([text], base.tokenizer)[0])[None]).logits[0, -1, tokens]
        allowed = grammar.next[grammar.walk(text)] >= 0
        text += grammar.alphabet[int(logits.masked_fill(torch.from_numpy(~allowed), -torch.inf).argmax())]
    return text[len(context) :]


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("precision", [0, 2])
def test_constrained_decoding_is_masked_decoding(tiny_base, precision):
    """Contexts of different lengths, cut inside numbers, in one batch with a cache and forced tokens in chunks."""
    base, codec = tiny_base(), Codec(1.0, precision)
    text = codec.encode(np.random.default_rng(0).uniform(-50, 50, (12, 2)))
    contexts = [text[3:60], text[:17], text[11:44], text[20:21]]
    found = generate(base, codec, contexts, 3, 2, constrained=True)
    assert [r.text for r in found] == [_one_by_one(base, codec, context, 3, 2) for context in contexts]


@pytest.mark.slow
def test_ten_thousand_constrained_forecasts_all_parse(tiny_base):
    """Random weights, temperature 1, contexts cut anywhere, one to three variables, precision 0 to 3."""
    base, draw, invalid, total = tiny_base(), np.random.default_rng(0), 0, 0
    for n_variables in (1, 2, 3):
        for precision in range(4):
            codec = Codec(1.0, precision)
            contexts = []
            for _ in range(834):
                text = codec.encode(draw.normal(0, 5, (8, n_variables)))
                start = draw.integers(len(text) // 2)
                contexts.append(text[start : draw.integers(start + 1, len(text) + 1)])
            options = dict(constrained=True, temperature=1.0, seed=precision, batch_size=417)
            for context, result in zip(
                contexts, generate(base, codec, contexts, 2, n_variables, **options), strict=True
            ):
                whole = (context + result.text).partition(codec.step_separator)[2]
                invalid += codec.decode(whole, n_variables).stop < len(whole)
                total += 1
    assert total > 10_000 and invalid == 0


def test_every_constrained_forecast_is_valid(tiny_base, small_data):
    series = list(small_data.part("test"))
    codec = Codec(1.0)
    assert not any(f.valid for f in forecast(tiny_base(), codec, series, 3))
    assert all(f.valid and f.values.shape == (3, 2) for f in forecast(tiny_base(), codec, series, 3, constrained=True))
