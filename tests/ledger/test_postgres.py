"""One budget among machines: the same ledger in a PostgreSQL database, which may go away."""

import os
import tempfile
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest

from m2helpers.files import UserError
from m2helpers.flops.costs import Cost
from m2helpers.ledger import CapReached, Ledger, Spender, postgres, read_ledger
from m2helpers.ledger.stores import without_password
from tests.campaigns.ledger import campaign
from tests.postgres import Server, find_postgres

WHO = Spender("some-run", "initial", "abc")


@pytest.fixture(scope="module")
def server():
    programs = find_postgres()
    if programs is None and "M2_TEST_ALL" not in os.environ:
        pytest.skip("no PostgreSQL server here; Debian and Ubuntu: apt-get install postgresql")
    with tempfile.TemporaryDirectory(prefix="m2-pg-") as folder, Server(programs, Path(folder)) as running:
        yield running


@pytest.fixture
def url(server):
    """Of a database without a ledger."""
    server.empty()
    return server.url


@pytest.mark.slow
def test_it_is_the_same_ledger(url):
    ledger = Ledger(url, 1000)
    with ledger.reserve(WHO, train=Cost(10, 600, 1200), validate=Cost(10, 100, 200)) as bill:
        assert Ledger(url, 1000).spent() == 700
        with pytest.raises(CapReached, match=r"m2-pg.*: 301 FLOPs are needed next and 300 are left"):
            ledger.reserve(WHO, train=Cost(1, 301, 301)).__enter__()
        bill.add("train", Cost(10, 200, 400))
    (entry,) = ledger.entries()
    assert (entry["run"], entry["kind"], entry["flops"], entry["flops_course"]) == ("some-run", "train", 200, 400)
    assert entry["state"] == "settled" and read_ledger(url)["spent"] == ledger.spent() == 200
    whole = Cost(1, 10**17 - 200, 10**17)
    with Ledger(url).reserve(WHO, train=whole):
        assert ledger.spent() == 10**17  # to the last operation


@pytest.mark.slow
def test_many_processes_some_killed(url, tmp_path):
    result = campaign(tmp_path, processes=4, kills=2, seed=0, where=url)
    assert 0.9 * result["cap"] < result["spent"] <= result["cap"] and result["settled"] > 20


@pytest.mark.slow
def test_a_database_that_comes_back_is_waited_for(url, server, monkeypatch):
    """It goes away in the middle of the work, and once more just as the answer is due: nothing is written twice."""
    monkeypatch.setattr(postgres, "PAUSES", (0.2,) * 40)
    ledger = Ledger(url, 1000)
    with ledger.reserve(WHO, train=Cost(10, 600, 1200)) as bill:
        bill.add("train", Cost(10, 200, 400))
        server.stop()
        threading.Timer(1, server.start).start()
        with pytest.warns(UserWarning, match="cannot be reached .*trying again for 8 seconds"):
            ledger.spent()
    assert [(e["flops"], e["state"]) for e in ledger.entries()] == [(200, "settled")]


@pytest.mark.slow
def test_an_answer_that_was_lost_is_asked_for_again(url, monkeypatch):
    """The reservation arrived and the process was not told: done again, it stands once."""
    ledger, attempt = Ledger(url, 1000), postgres.PostgresStore._attempt
    lost = []

    def forget(store, work):
        answer = attempt(store, work)
        if not lost:
            lost.append(answer)
            raise postgres._Unreachable("the line is dead")
        return answer

    monkeypatch.setattr(postgres, "PAUSES", (0,))
    monkeypatch.setattr(postgres.PostgresStore, "_attempt", forget)
    with pytest.warns(UserWarning, match="the line is dead"), ledger.reserve(WHO, train=Cost(10, 600, 1200)):
        assert lost and [entry["flops"] for entry in ledger.entries()] == [600]


@pytest.mark.slow
def test_a_database_that_stays_away_stops_a_run_that_is_saved(
    url, server, monkeypatch, tmp_path, tiny_base, small_data
):
    """At the end of the first interval: no step is lost, and the resumed run is that of one left alone."""
    from m2helpers.settings import TrainSettings
    from m2helpers.training import train_lora

    monkeypatch.setattr(postgres, "PAUSES", (0.1,))
    settings = TrainSettings(max_steps=4, save_steps=2, eval_steps=4, batch_size=1, max_length=48, eval_windows=1)
    kept = train_lora(tiny_base(), small_data, settings, progress=False).history
    monkeypatch.setenv("M2_LEDGER", url)
    reserve = Ledger.reserve

    @contextmanager
    def leave(ledger, *arguments, **most):
        with reserve(ledger, *arguments, **most) as bill:
            server.stop()
            yield bill

    monkeypatch.setattr(Ledger, "reserve", leave)
    with pytest.warns(UserWarning), pytest.raises(UserError, match=r"cannot be reached .*can be resumed once the data"):
        train_lora(tiny_base(), small_data, settings, tmp_path / "run", progress=False)
    monkeypatch.undo()
    server.start()
    monkeypatch.setenv("M2_LEDGER", url)
    again = train_lora(tiny_base(), small_data, settings, tmp_path / "run", resume=True, progress=False)
    assert again.history["loss"].tolist() == kept["loss"].tolist()


@pytest.mark.slow
def test_what_is_no_ledger_is_one_line_without_the_password(monkeypatch):
    for where, said in (
        ("mysql://me:secret@host/db", r"mysql://me:\*\*\*@host/db: no such kind of ledger"),
        (
            "postgresql://me:secret@127.0.0.1:1/db",
            r"postgresql://me:\*\*\*@127.0.0.1:1/db: .* cannot be reached \(.*refused",
        ),
        ("postgresql://me:secret@host:port/db", r"postgresql://me:\*\*\*@host:port/db: not a URL"),
    ):
        with pytest.raises(UserError, match=said) as refused:
            Ledger(where)
        assert "secret" not in str(refused.value) and "\n" not in str(refused.value)
    assert without_password("/a/b:c@d.sqlite") == "/a/b:c@d.sqlite"


def test_a_file_on_a_network_disk_is_refused(tmp_path, monkeypatch):
    from collections import namedtuple

    part = namedtuple("part", "mountpoint fstype")
    disks = [part("/", "ext4"), part(str(tmp_path), "nfs4"), part(str(tmp_path / "local"), "xfs")]
    monkeypatch.setattr("psutil.disk_partitions", lambda all: disks)
    (tmp_path / "local").mkdir()
    Ledger(tmp_path / "local" / "ledger.sqlite")
    with pytest.raises(
        UserError, match=r"ledger.sqlite: on a network file system \(nfs4\).*local disk, or to postgresql"
    ):
        Ledger(tmp_path / "deep" / "ledger.sqlite")
