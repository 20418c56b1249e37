"""Turns and medians, with a clock of our own."""

from pathlib import Path

import pytest

from m2helpers.experiments import timing
from m2helpers.experiments.timing import rows_of, take_turns, timed


def test_sides_take_turns():
    calls = []
    sides = {name: lambda name=name: calls.append(name) or [float(len(calls))] for name in "ab"}
    assert take_turns(sides, 3) == {"a": [1, 3, 5], "b": [2, 4, 6]}
    assert calls == list("ababab")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="nothing tells the peak here")
def test_the_peak_of_every_turn_is_kept():
    held = []
    peaks = {"a": [], "b": []}
    take_turns({"a": lambda: [0.0], "b": lambda: held.append(bytearray(2 * 10**8)) or held.clear() or [0.0]}, 1, peaks)
    assert [len(values) for values in peaks.values()] == [1, 1]
    assert min(peaks["b"]) > max(peaks["a"]) + 0.15  # GB


def test_rows_say_how_many_times_faster_than_the_first_side():
    first, second = rows_of({"slow": [4.0, 9.0, 1.0], "fast": [2.0, 1.0, 5.0]})
    assert first == {"side": "slow", "seconds": 4.0, "ratio": 1.0, "times": [4.0, 9.0, 1.0]}
    assert second == {"side": "fast", "seconds": 2.0, "ratio": 2.0, "times": [2.0, 1.0, 5.0]}


def test_what_is_timed_runs_once(monkeypatch):
    ticks = iter([10.0, 12.5])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(ticks))
    calls = []
    assert timed(lambda: calls.append(1)) == 2.5 and calls == [1]
