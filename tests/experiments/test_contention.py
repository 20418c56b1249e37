"""How threads wait: the package's own rule, and the measurement in processes of their own."""

import subprocess
import sys

import pytest

from m2helpers.experiments import contention
from m2helpers.paths import ROOT


@pytest.mark.parametrize(
    "given, expected",
    [
        ({}, ["PASSIVE", None]),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, ["ACTIVE", None]),
        ({"GOMP_SPINCOUNT": "7"}, [None, "7"]),
    ],
)
def test_threads_sleep_while_they_wait_unless_the_user_says_otherwise(given, expected, monkeypatch):
    for name in contention.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    code = (
        f"import os, sys, m2helpers; print([os.environ.get(n) for n in {contention.VARIABLES}], 'torch' in sys.modules)"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout == f"{expected} False\n"


@pytest.mark.slow
def test_the_tests_and_their_kernels_wait_so_too(monkeypatch):
    """What pytest imports first sets the rule, before a test imports torch."""
    for name in contention.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    code = "import os, sys, conftest; print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)"
    told = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert told.stdout == "PASSIVE False\n"


def test_every_side_has_its_own_rule(monkeypatch, tmp_path):
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    started = []
    monkeypatch.setattr(contention.subprocess, "Popen", lambda *_, env=None, **__: started.append(env) or _Nothing())
    for changes in contention.SIDES.values():
        with contention._worker(tmp_path, changes):
            pass
    told = [{name: env[name] for name in contention.VARIABLES if name in env} for env in started]
    assert told == list(contention.SIDES.values()) and all("PATH" in env for env in started)


class _Nothing:
    __enter__ = __exit__ = lambda self, *_: None


@pytest.mark.slow
def test_sides_take_turns_idle_and_busy(long_data, monkeypatch):
    sides = {name: contention.SIDES[name] for name in ("spins 300 times", "passive")}
    monkeypatch.setattr(contention, "SIDES", sides)
    monkeypatch.setattr(contention.os, "cpu_count", lambda: 2)
    seconds = contention.compare_waiting(long_data.path, 1)
    works = ["forecasts", "validation"]
    assert list(seconds) == [f"{w}, {b}" for b in ("idle cores", "beside 2 busy processes") for w in works]
    assert all(list(times) == list(sides) for times in seconds.values())
    assert all(0 < value < 600 for times in seconds.values() for (value,) in times.values())
