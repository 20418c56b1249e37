"""The ledger: nothing is spent that was not reserved, the cap holds among processes, and no other file is touched."""

import json
import sqlite3
import subprocess
import sys

import pytest

from m2helpers.files import UserError
from m2helpers.flops.account import CAP
from m2helpers.flops.costs import Cost
from m2helpers.ledger import COLUMNS, CapReached, Ledger, Spender, default_ledger
from tests.campaigns.ledger import campaign

WHO = Spender("some-run", "initial", "abc")


def _cost(flops):
    return Cost(10, flops, 2 * flops)


@pytest.fixture
def ledger(tmp_path):
    return Ledger(tmp_path / "ledger.sqlite", cap=1000)


def test_spending_is_reserved_before_and_settled_after(ledger):
    with ledger.reserve(WHO, train=_cost(600), validate=_cost(100)) as bill:
        assert ledger.spent() == 700
        assert [entry["state"] for entry in ledger.entries()] == ["reserved", "reserved"]
        bill.add("train", _cost(200))
        bill.add("train", _cost(100))
        bill.add("validate", _cost(40))
        assert ledger.spent() == 700
    assert ledger.spent() == 340
    train, validate = ledger.entries()
    assert (train["kind"], train["tokens"], train["flops"], train["flops_course"]) == ("train", 20, 300, 600)
    assert (validate["kind"], validate["flops"], validate["state"]) == ("validate", 40, "settled")
    assert {train[key] for key in ("run", "stage", "settings_sha256")} == {"some-run", "initial", "abc"}


def test_the_cap_holds_for_all_kinds_together(ledger):
    with pytest.raises(CapReached, match="1001 FLOPs are needed next and 1000 are left"):
        ledger.reserve(WHO, train=_cost(600), validate=_cost(401)).__enter__()
    with ledger.reserve(WHO, train=_cost(600), validate=_cost(400)):
        assert ledger.spent() == 1000


def test_work_that_fails_is_charged_as_far_as_it_went(ledger):
    with pytest.raises(KeyboardInterrupt), ledger.reserve(WHO, train=_cost(600)) as bill:
        bill.add("train", _cost(50))
        raise KeyboardInterrupt
    assert ledger.spent() == 50
    with pytest.raises(ZeroDivisionError), ledger.reserve(WHO, train=_cost(600)):
        raise ZeroDivisionError
    assert ledger.spent() == 50 and len(ledger.entries()) == 1


def test_the_cap_is_never_passed(ledger):
    with ledger.reserve(WHO, train=_cost(1000)) as bill:
        with pytest.raises(CapReached, match=r"ledger.sqlite: 1 FLOPs are needed next and 0 are left of 1e\+03"):
            ledger.reserve(WHO, train=_cost(1)).__enter__()
        bill.add("train", _cost(999))
    with ledger.reserve(WHO, generate=_cost(1)) as bill:
        bill.add("generate", _cost(1))
    assert ledger.spent() == 1000
    assert Ledger(ledger.path).cap == CAP == 10**17


def test_more_than_was_reserved_is_a_mistake_in_the_program(ledger):
    with (
        pytest.raises(RuntimeError, match="train: 11 FLOPs spent of 10 reserved"),
        ledger.reserve(WHO, train=_cost(10)) as bill,
    ):
        bill.add("train", _cost(11))


def test_what_a_dead_process_had_reserved_counts_in_full(ledger):
    program = f"""
import os
from m2helpers.flops.costs import Cost
from m2helpers.ledger import Ledger, Spender
with Ledger({str(ledger.path)!r}, 1000).reserve(Spender("dead", "trial"), train=Cost(1, 300, 300)) as bill:
    bill.add("train", Cost(1, 5, 5))
    os.kill(os.getpid(), 9)
"""
    assert subprocess.run([sys.executable, "-c", program]).returncode == -9
    assert ledger.spent() == 300
    (entry,) = ledger.entries()
    assert (entry["run"], entry["flops"], entry["state"]) == ("dead", 300, "lost")


def test_a_number_used_again_by_another_process_is_no_sign_of_life(ledger):
    with ledger.reserve(WHO, train=_cost(10)):
        with sqlite3.connect(ledger.path) as database:  # as if a process of our number had started long ago
            host, pid, _ = database.execute("SELECT owner FROM entries").fetchone()[0].rsplit(" ", 2)
            database.execute("UPDATE entries SET owner = ?", (f"{host} {pid} 12345",))
        assert ledger.entries()[0]["state"] == "lost"
        with sqlite3.connect(ledger.path) as database:  # another machine's processes cannot be seen from here
            database.execute("UPDATE entries SET state = 'reserved', owner = ?", (f"elsewhere {pid} 12345",))
        assert ledger.entries()[0]["state"] == "reserved"


@pytest.mark.slow
def test_many_processes_some_killed(tmp_path):
    """The short version; 200 rounds of eight processes were run once (docs/experiment_log.md)."""
    lost = 0
    for seed in range(2):
        result = campaign(tmp_path, processes=4, kills=2, seed=seed)
        lost += result["lost"]
        assert 0.9 * result["cap"] < result["spent"] <= result["cap"] and result["settled"] > 20


@pytest.mark.parametrize("content", [b"", b"not a database at all, but long enough to be taken for one" * 30, None])
def test_another_file_is_refused_and_left_alone(tmp_path, content):
    path = tmp_path / "other.sqlite"
    if content is None:  # a database, but not ours
        with sqlite3.connect(path) as database:
            database.execute("CREATE TABLE entries (flops INTEGER)")
    else:
        path.write_bytes(content)
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"other.sqlite: damaged, or not a ledger .*move it away, or set M2_LEDGER"):
        Ledger(path)
    assert path.read_bytes() == before


def test_a_damaged_ledger_is_refused(ledger):
    with ledger.reserve(WHO, train=_cost(600)) as bill:
        bill.add("train", _cost(600))
    content = bytearray(ledger.path.read_bytes())
    content[4096:6000] = b"\x07" * (6000 - 4096)  # the page of entries
    ledger.path.write_bytes(content)
    with pytest.raises(UserError, match=r"damaged, or not a ledger \(.+\); move it away"):
        Ledger(ledger.path)
    assert ledger.path.read_bytes() == content


def test_a_ledger_that_is_deleted_meanwhile_is_not_started_afresh(ledger):
    with pytest.raises(UserError, match="the ledger cannot be written"), ledger.reserve(WHO, train=_cost(600)):
        ledger.path.unlink()
    assert not ledger.path.exists()


def test_a_folder_that_takes_no_ledger_is_named(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise sqlite3.OperationalError("unable to open database file")

    monkeypatch.setattr(sqlite3, "connect", refuse)
    with pytest.raises(UserError, match=r"new.sqlite: the ledger cannot be written \(unable to open"):
        Ledger(tmp_path / "new.sqlite")


def test_the_file_is_the_one_the_variable_names(tmp_path, monkeypatch):
    monkeypatch.setenv("M2_LEDGER", str(tmp_path / "deep" / "here.sqlite"))
    assert default_ledger("embedded").path == tmp_path / "deep" / "here.sqlite"
    monkeypatch.delenv("M2_LEDGER")
    monkeypatch.setattr("m2helpers.paths.CHECKPOINTS", tmp_path)
    assert default_ledger("Qwen/Qwen2.5-0.5B").path == tmp_path / "Qwen2.5-0.5B" / "ledger.sqlite"
    assert sorted(p.name for p in (tmp_path / "deep").iterdir()) == ["here.sqlite"]  # nothing half made beside it


def test_the_ledger_needs_no_torch():
    program = "import m2helpers.ledger, m2helpers.__main__ as m, sys; m._parser(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_the_json_adds_up(ledger):
    with ledger.reserve(WHO, train=_cost(600)) as bill:
        bill.add("train", _cost(250))
    report = json.loads(json.dumps(ledger.to_json()))
    assert (report["cap"], report["spent"], report["left"]) == (1000, 250, 750)
    assert [set(entry) for entry in report["entries"]] == [set(COLUMNS)]
