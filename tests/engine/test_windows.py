"""Windows of text: none is lost but what predicts nothing, and every epoch sees each of them once."""

import numpy as np

from m2helpers.engine.windows import endless_series, pick, text_windows
from m2helpers.simulator import Law, SimulatorSettings, draw_parameters, integrate
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


def test_series_without_end_are_functions_of_seed_and_place_and_never_come_twice():
    drawn = draw_parameters(SimulatorSettings(systems=40)).to_numpy()
    law = Law(drawn, 2.0, 12)
    places = [0, 1, 63, 64, 500]
    series = [endless_series(law, 0, place) for place in places]
    assert all(values.shape == (12, 2) and (values > 0).all() for values in series)
    assert len({values.tobytes() for values in series} | {endless_series(law, 1, 0).tobytes()}) == 6
    for place in reversed(places):  # in any order
        np.testing.assert_array_equal(endless_series(law, 0, place), series[places.index(place)])
    parameters = law.draw(64, [0, 2, 1])[:1]  # of the second block
    np.testing.assert_allclose(integrate(parameters.T[:6], parameters.T[6:], 12, 2.0)[..., 0], series[3], rtol=1e-3)
