"""Windows of text: none is lost but what predicts nothing, and every epoch sees each of them once."""

import numpy as np

from m2helpers.engine.windows import pick, text_windows
from m2helpers.text import Codec


def test_windows_keep_the_short_end_and_drop_what_predicts_nothing(tiny_base):
    codec, tokenizer = Codec(1.0), tiny_base().tokenizer
    series = np.ones((2, 5, 2))  # ten characters a step
    assert [len(w) for w in text_windows(series, codec, tokenizer, 32)] == [32, 18, 32, 18]
    assert [len(w) for w in text_windows(series, codec, tokenizer, 49)] == [49, 49]  # and one token left over
    whole = np.concatenate(text_windows(series[:1], codec, tokenizer, 32))
    assert tokenizer.decode(whole) == codec.encode(series[0])


def test_every_epoch_sees_every_window_once():
    n, batch = 10, 4
    places = [pick(3, place, n) for place in range(5 * batch)]
    assert sorted(places[:n]) == sorted(places[n:]) == list(range(n))
    assert places[:n] != places[n:]
