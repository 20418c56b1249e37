"""The ledger: nothing is spent that was not reserved, the cap holds among processes, and no other file is touched."""

import json
import sqlite3
import subprocess
import sys

import h5py
import numpy as np
import pytest

from m2helpers.__main__ import main
from m2helpers.files import UserError
from m2helpers.flops.account import CAP
from m2helpers.flops.costs import Cost
from m2helpers.ledger import (
    COLUMNS,
    CapReached,
    Ledger,
    Spender,
    default_ledger,
    ledger_note,
    ledger_path,
    read_ledger,
)
from m2helpers.paths import EMBEDDED_BASE
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
    assert Ledger(ledger.where).cap == CAP == 10**17


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
with Ledger({str(ledger.where)!r}, 1000).reserve(Spender("dead", "trial"), train=Cost(1, 300, 300)) as bill:
    bill.add("train", Cost(1, 5, 5))
    os.kill(os.getpid(), 9)
"""
    assert subprocess.run([sys.executable, "-c", program]).returncode == -9
    assert ledger.spent() == 300
    (entry,) = ledger.entries()
    assert (entry["run"], entry["flops"], entry["state"]) == ("dead", 300, "lost")


def test_a_number_used_again_by_another_process_is_no_sign_of_life(ledger):
    with ledger.reserve(WHO, train=_cost(10)):
        with sqlite3.connect(ledger.where) as database:  # as if a process of our number had started long ago
            host, pid, *_ = database.execute("SELECT owner FROM entries").fetchone()[0].split()
            database.execute("UPDATE entries SET owner = ?", (f"{host} {pid} 12345",))
        assert ledger.entries()[0]["state"] == "lost"
        with sqlite3.connect(ledger.where) as database:  # another machine's processes cannot be seen from here
            database.execute("UPDATE entries SET state = 'reserved', owner = ?", (f"elsewhere {pid} 12345",))
        assert ledger.entries()[0]["state"] == "reserved"


@pytest.mark.slow
def test_many_processes_some_killed(tmp_path):
    """The short version; 200 rounds of eight processes were run once (docs/experiment_archive.md)."""
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
    content = bytearray(ledger.where.read_bytes())
    content[4096:6000] = b"\x07" * (6000 - 4096)  # the page of entries
    ledger.where.write_bytes(content)
    with pytest.raises(UserError, match=r"damaged, or not a ledger \(.+\); move it away"):
        Ledger(ledger.where)
    assert ledger.where.read_bytes() == content


def test_a_ledger_that_is_deleted_meanwhile_is_not_started_afresh(ledger):
    with pytest.raises(UserError, match="the ledger cannot be written"), ledger.reserve(WHO, train=_cost(600)):
        ledger.where.unlink()
    assert not ledger.where.exists()


def test_a_folder_that_takes_no_ledger_is_named(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise sqlite3.OperationalError("unable to open database file")

    monkeypatch.setattr(sqlite3, "connect", refuse)
    with pytest.raises(UserError, match=r"new.sqlite: the ledger cannot be written \(unable to open"):
        Ledger(tmp_path / "new.sqlite")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"new.sqlite: the ledger cannot be written \(.*File exists"):
        Ledger(tmp_path / "file" / "new.sqlite")


def test_a_full_disk_is_told_as_sqlite_tells_it(ledger, monkeypatch):
    """SQLite has rolled back itself by then: to do it again would be the error that is seen."""
    connect = sqlite3.connect

    def full(*arguments, **options):
        database = connect(*arguments, **options)
        pages = database.execute("PRAGMA page_count").fetchone()[0]
        database.execute(f"PRAGMA max_page_count = {pages}")
        return database

    monkeypatch.setattr(sqlite3, "connect", full)
    cause = r"ledger.sqlite: the ledger cannot be written \(database or disk is full\); free it, or set M2_LEDGER"
    with pytest.raises(UserError, match=cause):
        for _ in range(1000):
            with ledger.reserve(Spender("long name " * 20, "initial"), train=Cost(1, 1, 1)) as bill:
                bill.add("train", Cost(1, 1, 1))
    monkeypatch.undo()
    assert 0 < ledger.spent() == len(ledger.entries()) < 1000  # what was settled is kept


# ---------------------------------------------------------------- whose it is


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A place of its own for folders of bases, and no variable that names another ledger."""
    monkeypatch.delenv("M2_LEDGER", raising=False)
    monkeypatch.setattr("m2helpers.paths.CHECKPOINTS", tmp_path / "checkpoint")
    return tmp_path


@pytest.fixture
def net(home):
    """Makes a folder with weights; the ledger asks for no more."""

    def make(name, weights):
        (home / name).mkdir(parents=True, exist_ok=True)
        (home / name / "model.safetensors").write_bytes(weights)
        return str(home / name)

    return make


def test_the_file_is_the_one_the_variable_names(home, monkeypatch):
    assert default_ledger("embedded").where == home / "checkpoint" / "embedded" / "ledger.sqlite"
    monkeypatch.setenv("M2_LEDGER", str(home / "deep" / "here.sqlite"))
    assert default_ledger("embedded").where == home / "deep" / "here.sqlite"
    assert sorted(p.name for p in (home / "deep").iterdir()) == ["here.sqlite"]  # nothing half made beside it


def test_two_bases_whose_folders_end_alike_share_nothing(net, home):
    one, other = (ledger_path(net(f"{side}/net", side.encode() * 9)) for side in "ab")
    assert one.parent.parent == other.parent.parent == home / "checkpoint" and one.parent != other.parent
    assert {path.parent.name.rpartition("-")[0] for path in (one, other)} == {"net"}
    with Ledger(one).reserve(WHO, train=_cost(600)) as bill:
        bill.add("train", _cost(600))
    assert read_ledger(one)["spent"] == 600 and read_ledger(other)["spent"] == 0


def test_a_copy_is_the_same_base(net, home):
    """Its weights are, whatever it is called: a budget cannot be had twice by copying a folder."""
    default_ledger(net("a/net", b"weights"))
    path = ledger_path(net("b/other", b"weights"))
    assert path == ledger_path(str(home / "a" / "net")) and path.is_file()
    assert "one base" in ledger_note(str(home / "b" / "other"), path) and not ledger_note("a/net", path)
    (home / "b" / "other" / "model.safetensors").write_bytes(b"trained!")
    assert ledger_path(str(home / "b" / "other")) != path


def test_a_ledger_of_all_bases_says_so(net, home, monkeypatch, capsys):
    """What another base has spent there is not taken for one's own."""
    monkeypatch.setenv("M2_LEDGER", str(home / "all.sqlite"))
    with default_ledger(net("a/net", b"weights")).reserve(WHO, train=_cost(600)) as bill:
        bill.add("train", _cost(600))
    assert main(["ledger", "--model", net("b/net", b"others")]) == 0
    assert "all.sqlite (named by M2_LEDGER: one budget for all bases): 600 FLOPs spent" in capsys.readouterr().out


def test_a_loaded_base_and_its_name_have_one_ledger(home, tiny_base, tiny_folder):
    base = tiny_base()
    assert ledger_path(base) == ledger_path(str(tiny_folder))
    assert ledger_path(base).parent.name == f"tiny-{base.sha256[:8]}"


def test_only_the_shipped_weights_are_the_embedded_base(net, home):
    copy = net("copy", (EMBEDDED_BASE / "model.safetensors").read_bytes())
    ours = home / "checkpoint" / "embedded" / "ledger.sqlite"
    assert ledger_path("embedded") == ledger_path(str(EMBEDDED_BASE)) == ledger_path(copy) == ours
    assert ledger_path(net("embedded", b"other weights")).parent.name.startswith("embedded-")


def test_reading_makes_no_file(net, home, capsys):
    """Neither of a base that never spent, nor of a name that is mistyped."""
    assert main(["ledger", "--model", net("a/net", b"weights"), "--json", str(home / "spent.json")]) == 0
    printed = capsys.readouterr().out
    assert "nothing has been spent yet, 1e+17 left of 1e+17" in printed and printed.count("\n") == 1
    assert json.loads((home / "spent.json").read_text()) == {"cap": CAP, "spent": 0, "left": CAP, "entries": []}
    assert main(["ledger", "--model", "embeded"]) == 1
    assert capsys.readouterr().err.startswith("m2helpers ledger: embeded: no such model; give 'embedded', a folder")
    (home / "empty").mkdir()
    assert main(["ledger", "--model", str(home / "empty")]) == 1
    assert "no model*.safetensors weights in" in capsys.readouterr().err
    assert not (home / "checkpoint").exists()


def test_a_hub_name_that_is_not_in_the_cache_is_not_fetched(home, capsys, monkeypatch):
    asked = []

    def download(name, local_files_only=False, **_):
        asked.append(local_files_only)
        raise FileNotFoundError

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert main(["ledger", "--model", "someone/some-model"]) == 1
    assert "someone/some-model: not in the hub's local cache" in capsys.readouterr().err
    assert asked and all(asked) and not (home / "checkpoint").exists()


def test_a_forecast_opens_its_ledger_once(home, tiny_folder, monkeypatch):
    opened = []
    monkeypatch.setattr(
        Ledger, "__init__", lambda *arguments, __init__=Ledger.__init__: opened.append(1) or __init__(*arguments)
    )
    with h5py.File(home / "three.h5", "w") as file:
        file["trajectories"] = np.random.default_rng(0).random((3, 8, 1)) + 1
    command = ["forecast", str(home / "three.h5"), "--model", str(tiny_folder), "--steps", "2", "--constrained"]
    for samples, expected in (("0", 1), ("2", 2)):
        assert main([*command, "--samples", samples, "--out", str(home / "out.csv")]) == 0
        assert len(opened) == expected


@pytest.mark.slow
def test_the_ledger_needs_no_torch():
    """Nor does a base that is given by its folder, or by the name that it has in the hub's cache."""
    program = (
        "import m2helpers.ledger as l, m2helpers.__main__ as m, sys; m.parse(['ledger']); l.ledger_path('embedded')"
    )
    program += "; from m2helpers.paths import EMBEDDED_BASE, is_embedded; l.ledger_path(str(EMBEDDED_BASE))"
    program += "; is_embedded('someone/some-model'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_the_json_adds_up(ledger):
    with ledger.reserve(WHO, train=_cost(600)) as bill:
        bill.add("train", _cost(250))
    report = json.loads(json.dumps(ledger.to_json()))
    assert (report["cap"], report["spent"], report["left"]) == (1000, 250, 750)
    assert [set(entry) for entry in report["entries"]] == [set(COLUMNS)]
