"""The campaigns, briefly: fuzzed inputs, faults under a run, many numbers; and the examples in docstrings."""

import doctest
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import m2helpers
from m2helpers.ledger import Ledger
from tests.campaigns import faults, fuzz, numbers

ROOT = Path(__file__).resolve().parent.parent
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits and signals as Linux has them")


@linux
@pytest.mark.slow
def test_inputs_that_nobody_checked_end_in_a_result_or_in_one_line():
    """In a process of its own: it limits its memory, and watches what Python does."""
    command = [sys.executable, "-m", "tests.campaigns.fuzz", "100", "--seed", "1"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    ended = json.loads(done.stdout.splitlines()[-1])
    assert set(ended) == set(fuzz.SHARES) and {how for each in ended.values() for how in each} <= {
        "done",
        "refused",
        "usage",
    }
    assert sum(ended["csv"].values()) == 22 and ended["csv"]["done"] and ended["csv"]["refused"]


@linux
@pytest.mark.slow
@pytest.mark.parametrize(
    "name, met",
    [
        ("train", [("ENOSPC", 3), ("SIGHUP", 5), ("removed", 4)]),
        ("instruct", [("EROFS", 1)]),
        ("forecast", [("EACCES", 1), ("memory", 1)]),
        ("ledger", [("ENOSPC", 1)]),
    ],
)
def test_what_goes_wrong_under_a_run_costs_nothing_that_was_saved(name, met, tmp_path):
    faults.prepare(tmp_path)
    campaign = faults.Campaign(name, tmp_path)
    for kind, at in met:
        campaign.meet(faults.Fault(kind, at=at))
    ended = {"SIGHUP": "killed"}  # which nothing answers; all else in one line
    assert campaign.met == {f"{kind}: {ended.get(kind, 'refused')}": 1 for kind, _ in met}


@pytest.mark.slow
def test_every_sampled_forecast_parses(tiny_base, tmp_path):
    found = numbers.sampled(tiny_base(), Ledger(tmp_path / "ledger.sqlite"), 12 * 4, a_round=4)
    assert found["invalid"] == 0 and found["negative"] > 20


def test_examples_in_docstrings():
    """Of every public name: they print what they say."""
    finder, runner = doctest.DocTestFinder(), doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    seen = 0
    for name in m2helpers.__all__:
        for example in finder.find(getattr(m2helpers, name), name, globs={"m2helpers": m2helpers}):
            seen += bool(example.examples)
            runner.run(example)
    assert runner.summarize(verbose=False).failed == 0 and seen >= 4
