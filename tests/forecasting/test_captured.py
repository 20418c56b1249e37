"""Decoding in steps of one shape: what is written and billed is what the CPU's way writes and bills."""

import numpy as np
import pytest
import torch

from m2helpers.engine.attention import attend_lean
from m2helpers.files import UserError
from m2helpers.forecasting import captured
from m2helpers.forecasting.captured import _longest_chain, continue_captured
from m2helpers.forecasting.decoding import Chooser, End, Rules, continue_prompts, uniform_numbers
from m2helpers.text import Codec, Grammar, tokenise

CONTEXTS = ["1.16,1.27;0.90,0.95;", "0.83", "1.16,1.27;0.90,0.95;", "9.99,-10.25;1.", "0.83", "2", "-0.11,0.70;-"]


@pytest.fixture
def small_passes(monkeypatch):
    """Rows leave as soon as half of them are done, and prompts are read in several passes."""
    for name, value in dict(CHECK=1, COMPACT=2, PREFILL_TOKENS=40, ROOM=8).items():
        monkeypatch.setattr(captured, name, value)


def _continued(write, base, codec, *, temperature, constrained, n_steps=4, most=60):
    ids = tokenise(CONTEXTS, base.tokenizer)
    grammar = Grammar(codec, 2)
    rules, states = (Rules(grammar, base), [grammar.walk(text) for text in CONTEXTS]) if constrained else (None, [])
    end = End(int(tokenise([";"], base.tokenizer)[0][0]), n_steps, most)
    chooser = Chooser(temperature, uniform_numbers(CONTEXTS, most, 3, base.model.device))
    told: list[int] = []
    with torch.inference_mode(), attend_lean(base.model):
        written, read = write(base, ids, end, chooser, rules, states, told.append)
    return written, read, sum(told)


@pytest.mark.parametrize("constrained", [True, False])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("precision", [2, 0])
def test_it_writes_and_reads_what_the_cpu_does(
    tiny_base, small_passes, temperature, constrained, precision, monkeypatch
):
    """Rows of different lengths, some alike, which end after different numbers of passes, or never by a separator."""
    base, codec = tiny_base(), Codec(1.0, precision=2)
    if precision == 0:
        codec = Codec(1.0, precision=0)
        monkeypatch.setattr(f"{__name__}.CONTEXTS", ["1,1;0,0;", "0,", "12", "0,"])
    how = dict(temperature=temperature, constrained=constrained)
    expected = _continued(continue_prompts, base, codec, **how)
    found = _continued(continue_captured, base, codec, **how)
    assert found == expected
    assert len({len(row) for row in found[0]}) > 1 or not constrained
    if constrained:
        assert found[2] == 4 * len(CONTEXTS) and all(row.count(26) == 4 for row in found[0])


@pytest.mark.slow
def test_rows_that_are_done_stay_as_they_are_until_the_next_look(tiny_base, monkeypatch):
    """However seldom the host looks, and with no row ever taken out."""
    expected = _continued(continue_prompts, tiny_base(), Codec(1.0), temperature=0.7, constrained=True)
    for often in (2, 7, 50):
        monkeypatch.setattr(captured, "CHECK", often)
        assert _continued(continue_captured, tiny_base(), Codec(1.0), temperature=0.7, constrained=True) == expected


def test_the_longest_chain_is_that_of_a_walk():
    """A point after a leading zero, or a separator after the last decimal, and then the writer is free again."""
    grammar = Grammar(Codec(1.0), 2)
    assert _longest_chain(grammar.forced, grammar.next) == 1
    table = np.array([[1, -1], [2, 3], [-1, 3], [4, -1], [0, 0]])  # 0 → 1, and 2 → 3 → 4
    assert _longest_chain(np.array([0, -1, 1, 0, -1]), table) == 2


def test_a_model_that_gives_no_number_is_refused(tiny_base):
    base = tiny_base()
    base.model.model.norm.weight.data[3] = torch.nan
    with pytest.raises(UserError, match="not a number"):
        _continued(continue_captured, base, Codec(1.0), temperature=0.0, constrained=True)
