"""One writer a run's folder."""

import multiprocessing
import os

import pytest

from m2helpers.engine.writer import LOCK_NAME, one_writer, sole_writer
from m2helpers.files import UserError
from m2helpers.pretraining import run as pretraining
from m2helpers.settings import PretrainSettings, TrainSettings
from m2helpers.training import train_lora

QUICK = TrainSettings(lora_r=2, max_steps=2, max_length=48, batch_size=2, eval_windows=2, eval_steps=2, save_steps=1)
processes = multiprocessing.get_context("fork")  # quick: nothing is imported again, and nothing trains in them


def _hold(folder, said, until):
    """Write a run, as it were: say so, and end when told to; say what was refused."""
    try:
        with sole_writer(folder):
            said.put("held")
            until.wait()
    except UserError as error:
        said.put(str(error))


@pytest.fixture
def start():
    """Starts processes that want to write into a folder."""
    started = []

    def begin(folder, n=1):
        said, until = processes.Queue(), processes.Event()  # new ones: a killed process leaves its own locked
        new = [processes.Process(target=_hold, args=(folder, said, until)) for _ in range(n)]
        started.extend(new)
        for process in new:
            process.start()
        return [said.get(timeout=60) for _ in range(n)], new, until

    yield begin
    for process in started:
        process.kill()
        process.join()


def test_a_folder_has_one_writer(start, tiny_base, small_data, tmp_path):
    """The second one is refused before it writes anything, and may begin when the first has ended."""
    folder = tmp_path / "run"
    _, (other,), until = start(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    said = f"{folder}: run is being written by process {other.pid}; wait, stop it, or choose another folder"
    for resume in (False, True):
        with pytest.raises(UserError, match=f"^{said}$"):
            train_lora(tiny_base(), small_data, QUICK, folder, resume=resume, progress=False)
        with pytest.raises(UserError, match=f"^{said}$"):
            pretraining.pretrain(PretrainSettings(), folder, resume=resume)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    until.set()
    other.join()
    assert other.exitcode == 0 and not folder.exists()  # nothing was written into it
    train_lora(tiny_base(), small_data, QUICK, folder, progress=False)
    assert LOCK_NAME not in os.listdir(folder) and (folder / "history.csv").exists()


def test_a_killed_writer_holds_nothing(start, tmp_path):
    _, (other,), _ = start(tmp_path / "run")
    other.kill()
    other.join()
    assert os.listdir(tmp_path / "run") == [LOCK_NAME]
    with sole_writer(tmp_path / "run"):
        (tmp_path / "run" / "kept").touch()
    assert os.listdir(tmp_path / "run") == ["kept"]


@pytest.mark.parametrize("left_over", [False, True])
def test_of_many_that_begin_at_once_one_writes(start, tmp_path, left_over):
    """Whether the folder is new or a killed run's lock is still in it."""
    if left_over:
        _, (killed,), _ = start(tmp_path)
        killed.kill()
        killed.join()
        assert os.listdir(tmp_path) == [LOCK_NAME]
    said, others, until = start(tmp_path, 5)
    assert sorted(line == "held" for line in said) == [False] * 4 + [True]
    assert all(f"{tmp_path}: run is being written by " in line for line in said if line != "held")
    until.set()
    for process in others:
        process.join()
    assert not os.listdir(tmp_path)


def test_a_writer_in_the_same_process_counts(tmp_path):
    with sole_writer(tmp_path / "run"):
        with pytest.raises(UserError, match=f"written by process {os.getpid()}"), sole_writer(tmp_path / "run"):
            pass
        assert os.listdir(tmp_path / "run") == [LOCK_NAME]


def test_a_writer_of_another_machine_is_named(tmp_path):
    """Whether it lives nobody can tell from here, so the remedy names the file."""
    (tmp_path / LOCK_NAME).write_text("77\nfar-away\n1\n")
    said = rf"being written by another process \(pid 77 on far-away, .*\); wait, or delete {tmp_path / LOCK_NAME} if"
    with pytest.raises(UserError, match=said), sole_writer(tmp_path):
        pass
    assert os.listdir(tmp_path) == [LOCK_NAME]


def test_a_folder_that_stays_empty_is_not_left_behind(tmp_path):
    with pytest.raises(UserError, match="no"), sole_writer(tmp_path / "a" / "b" / "c"):
        raise UserError("no")
    assert not os.listdir(tmp_path)
    (tmp_path / "mine").mkdir()
    with sole_writer(tmp_path / "mine"):
        pass
    assert os.listdir(tmp_path) == ["mine"]  # it was there before


def test_a_run_is_held_while_it_trains_and_no_longer(tmp_path):
    seen = []

    @one_writer
    def run(number, output_dir=None, *, fails=False):
        """Documented."""
        seen.append(output_dir and (output_dir / LOCK_NAME).is_file())
        if fails:
            raise UserError("failed")
        return number

    assert run(1) == 1 and run(2, tmp_path) == 2 and run(3, output_dir=tmp_path) == 3
    with pytest.raises(UserError, match="failed"):
        run(4, tmp_path, fails=True)
    assert seen == [None, True, True, True] and not os.listdir(tmp_path) and run.__doc__ == "Documented."
