"""The verdict on an expectation: three words, and figures behind them."""

import numpy as np
import pytest

from m2helpers.report.verdicts import all_fall, expected


@pytest.mark.parametrize(
    ("held", "word"), [(True, "Held"), (False, "Failed"), (None, "Unclear"), (np.False_, "Failed")]
)
def test_a_verdict_is_one_of_three_words(held, word):
    assert expected("errors fall", held, "0.2, then 0.1") == f"*Expected:* errors fall. **{word}**: 0.2, then 0.1."


def test_it_ends_in_one_full_stop_with_and_without_figures():
    assert expected("errors fall", True) == "*Expected:* errors fall. **Held**."
    assert expected("errors fall", True, "They do.").endswith("They do.")


def test_an_interval_over_zero_decides_nothing_and_a_clear_rise_everything():
    fall, rise, open_ = (-5.0, -8.0, -2.0), (5.0, 2.0, 8.0), (-1.0, -4.0, 2.0)
    assert all_fall([fall, fall]) is True
    assert all_fall([fall, open_]) is None
    assert all_fall([fall, open_, rise]) is False
    assert all_fall([]) is None
