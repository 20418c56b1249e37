"""Runs that are killed, or asked to stop, end as if they had been left alone."""

import os
import signal
import threading

import pytest

from m2helpers.engine.loop import stop_on_signal
from tests.campaigns.resume import campaign


@pytest.mark.slow
def test_a_run_killed_at_any_write_or_moment_ends_the_same(tmp_path):
    hit = campaign(tmp_path, kills=3, seed=0)
    assert hit["boundaries"] == hit["writes"] > 15  # a kill that misses shows nothing
    assert hit["random"] > 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_for_the_end_of_the_step(number):
    before = signal.getsignal(number)
    with stop_on_signal() as asked:
        assert not asked()
        os.kill(os.getpid(), number)
        assert asked()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
    assert signal.getsignal(number) is before


def test_other_threads_get_no_signals():
    seen = []
    thread = threading.Thread(target=lambda: seen.append(stop_on_signal().__enter__()()))
    thread.start()
    thread.join()
    assert seen == [False]
