"""The training loop: what comes when, and that runs that are killed or asked to stop end as if they had been left alone."""

import os
import signal
import threading
from contextlib import contextmanager

import pytest

from m2helpers.engine.loop import Stopped, run_steps, stop_on_signal
from m2helpers.engine.resume import State
from tests.campaigns.resume import campaign


class Noting:
    """A run that does nothing but note what it is asked to do; a validation follows every third step and the last."""

    def __init__(self, state=None, max_steps=7, save_steps=2):
        self.state, self.max_steps, self.save_steps = state or State(), max_steps, save_steps
        self.seen, self.during = [], {}

    def _note(self, what, at):
        self.seen.append((what, at))
        self.during.get((what, at), lambda: None)()

    @contextmanager
    def interval(self, stop):
        self._note("enter", stop)
        yield
        self._note("leave", stop)

    def step(self):
        self.state.step += 1
        self.state.due = self.state.step % 3 == 0 or self.state.step == self.max_steps
        self._note("step", self.state.step)
        return "shown"

    def validate(self, asked_to_stop):
        self._note("validate", self.state.step)
        self.state.due = asked_to_stop()

    def save(self):
        self._note("save", self.state.step)


def _interrupt():
    os.kill(os.getpid(), signal.SIGINT)


FIRST = [("enter", 2), ("step", 1), ("step", 2), ("save", 2), ("leave", 2)]
SECOND = [("enter", 4), ("step", 3), ("validate", 3), ("step", 4), ("save", 4), ("leave", 4)]
THIRD = [("enter", 6), ("step", 5), ("step", 6), ("validate", 6), ("save", 6), ("leave", 6)]
LAST = [("enter", 7), ("step", 7), ("validate", 7), ("save", 7), ("leave", 7)]


def test_what_comes_when():
    """Every save has an interval of its own, which ends after it, and a validation comes before the save at the same step."""
    work = Noting()
    run_steps(work, "run", progress=False)
    assert work.seen == FIRST + SECOND + THIRD + LAST


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        (State(step=3), [("enter", 4), ("step", 4), ("save", 4), ("leave", 4), *THIRD, *LAST]),
        (State(step=6, due=True), [("enter", 7), ("validate", 6), *LAST[1:]]),
        (State(step=7, due=True), [("enter", 7), ("validate", 7), ("save", 7), ("leave", 7)]),
        (State(step=7), []),
    ],
)
def test_it_begins_where_the_run_stands(state, expected):
    work = Noting(state)
    run_steps(work, "run", progress=False)
    assert work.seen == expected


def test_a_stop_in_a_step_is_saved_and_says_how_to_resume():
    work = Noting()
    work.during["step", 1] = _interrupt
    with pytest.raises(Stopped, match=r"^run: stopped at step 1 of 7; --resume goes on from there$"):
        run_steps(work, "run", progress=False)
    assert work.seen == [("enter", 2), ("step", 1), ("save", 1), ("leave", 2)]
    with pytest.raises(Stopped, match=r"^run: stopped at step 2 of 7$"):
        work.during["step", 2] = _interrupt
        run_steps(work, "run", progress=False, resumable=False)


def test_a_validation_left_when_asked_to_stop_is_still_due():
    work = Noting()
    work.during["step", 3] = _interrupt
    with pytest.raises(Stopped, match="stopped at step 3"):
        run_steps(work, "run", progress=False)
    assert work.state.due and work.seen == [*FIRST, *SECOND[:3], ("save", 3), ("leave", 4)]
    work.seen.clear()
    run_steps(work, "run", progress=False)
    assert work.seen == [("enter", 4), *SECOND[2:], *THIRD, *LAST]


def test_a_stop_that_comes_after_everything_is_done_is_none():
    work = Noting()
    work.during["save", 7] = _interrupt
    run_steps(work, "run", progress=False)
    assert work.seen[-2:] == [("save", 7), ("leave", 7)]


def test_out_of_time_it_returns_one_step_further():
    work = Noting(max_steps=2)
    run_steps(work, "run", progress=False, stop_after=0.0)
    assert work.seen == [("enter", 2), ("step", 1), ("save", 1), ("leave", 2)]


def test_the_bar_shows_what_a_step_returns(capsys):
    run_steps(Noting(), "of seven", stop_after=60)
    shown = capsys.readouterr().err
    assert "of seven: 100%" in shown and "7/7" in shown and "shown" in shown


@pytest.mark.slow
@pytest.mark.long
def test_a_run_killed_at_any_write_or_moment_ends_the_same(tmp_path):
    hit = campaign("fine-tuning", tmp_path, kills=3, seed=0)
    assert hit["boundaries"] == hit["writes"] > 15  # a kill that misses shows nothing
    assert hit["random"] > 0


@pytest.mark.slow
def test_pre_training_killed_at_a_write_or_a_moment_ends_the_same(tmp_path):
    """Every fifth write boundary, to be quick; the campaign by hand has all of them."""
    hit = campaign("pre-training", tmp_path, kills=2, seed=0, every=5)
    assert hit["boundaries"] == -(-hit["writes"] // 5) > 4
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
