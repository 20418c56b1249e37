"""The ledger: one SQLite file that every FLOP of an experiment is written in, and that cannot be overspent.

Spending is reserved before it happens and settled after, each in one transaction that locks the file, so the sum of what
is settled and what is reserved never passes the cap, however many processes spend at once. What a process had reserved
when it died counts in full: nobody knows how far it got.
"""

from __future__ import annotations

import os
import socket
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol, TypedDict, cast

import psutil

from .files import UserError
from .flops.account import CAP
from .flops.costs import Cost
from .paths import EMBEDDED, EMBEDDED_BASE, folder_of, own_folder, short_name

APPLICATION_ID = 0x4D32464C  # in the file's header: a database that is not a ledger is told from one that is
COLUMNS = ("id", "time", "run", "stage", "kind", "settings_sha256", "tokens", "flops", "flops_course", "state")
BUSY_SECONDS = 60.0
_SCHEMA = f"""
PRAGMA application_id = {APPLICATION_ID};
CREATE TABLE entries (
    id INTEGER PRIMARY KEY,
    time TEXT NOT NULL,
    run TEXT NOT NULL,
    stage TEXT NOT NULL,
    kind TEXT NOT NULL,
    settings_sha256 TEXT NOT NULL,
    tokens INTEGER NOT NULL CHECK (tokens >= 0),
    flops INTEGER NOT NULL CHECK (flops >= 0),
    flops_course INTEGER NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('reserved', 'settled', 'lost')),
    owner TEXT NOT NULL
);
"""


class CapReached(UserError):
    """The work asked for does not fit under the cap any more."""


class Entry(TypedDict):
    """One row of the ledger: `COLUMNS`."""

    id: int
    time: str
    run: str
    stage: str
    kind: str
    settings_sha256: str
    tokens: int
    flops: int
    flops_course: int
    state: str


class Report(TypedDict):
    """What ``ledger --json`` writes."""

    cap: int
    spent: int
    left: int
    entries: list[Entry]


@dataclass(frozen=True)
class Spender:
    """Whose spending it is; what an entry names."""

    run: str
    """Name of the run's folder, or of the base."""
    stage: str
    """`untrained`, `initial`, `final`, or any other part of the plan."""
    settings_sha256: str = ""
    """Hash of the run's settings; empty for a base."""


class Payer(Protocol):
    """What the ledger has to know of a base (`models.Base`), or of a run loaded into one."""

    @property
    def name(self) -> str:
        """What the user called the base."""

    @property
    def short_name(self) -> str:
        """The last part of that."""

    @property
    def sha256(self) -> str:
        """Of its weights: which base it is, whatever it is called."""

    @property
    def run(self) -> str | None:
        """Name of the run whose updates it carries; None for the base alone."""

    @property
    def stage(self) -> str:
        """Part of the plan that the run belongs to."""

    @property
    def settings_sha256(self) -> str:
        """Of that run."""


def spender_of(base: Payer) -> Spender:
    """Who spends when something is done with a base, or with a run loaded into it."""
    return Spender(base.run or base.short_name, base.stage, base.settings_sha256)


class Bill:
    """What has been spent of a reservation so far."""

    def __init__(self, most: Mapping[str, Cost]) -> None:
        self.most = dict(most)
        self.spent = dict.fromkeys(most, Cost())

    def add(self, kind: str, cost: Cost) -> None:
        """Put work that was done on the bill.

        Raises
        ------
        RuntimeError
            If it was more than had been reserved: a mistake in the program that reserved it.
        """
        self.spent[kind] += cost
        if self.spent[kind].flops > self.most[kind].flops:
            raise RuntimeError(f"{kind}: {self.spent[kind].flops:,} FLOPs spent of {self.most[kind].flops:,} reserved")


class Ledger:
    """A ledger file, made when it does not exist.

    Parameters
    ----------
    path : Path
    cap : int
        FLOPs, exact account.

    Raises
    ------
    UserError
        If the file is damaged or something else than a ledger. It is left as it is.
    """

    def __init__(self, path: str | os.PathLike, cap: int = CAP) -> None:
        self.path, self.cap = Path(path), cap
        if not self.path.exists():
            self._create()
        with self._transaction() as database:
            (problem,) = database.execute("PRAGMA quick_check(1)").fetchone()
            if problem != "ok":
                raise sqlite3.DatabaseError(" ".join(problem.split()))

    @contextmanager
    def reserve(self, spender: Spender, place: str = "", /, **most: Cost) -> Iterator[Bill]:
        """Reserve the most that work can cost, and settle what it did cost when the block ends, however it ends.

        Parameters
        ----------
        place : str
            Put before the message of an error: how far the work had come.
        **most : Cost
            By kind: `train`, `validate`, `generate`.

        Raises
        ------
        CapReached
            Before anything is spent, if it does not fit under the cap.
        """
        needed = sum(cost.flops for cost in most.values())
        with self._transaction() as database:
            self._bury_the_dead(database)
            left = self.cap - _total(database)
            if needed > left:
                raise CapReached(
                    f"{place}{self.path}: {needed:.4g} FLOPs are needed next and {left:.4g} are left of {self.cap:.0e}; "
                    "spend less, or start another ledger (see the page on the ledger)"
                )
            rows = {kind: _insert(database, spender, kind, cost) for kind, cost in most.items()}
        bill = Bill(most)
        try:
            yield bill
        finally:
            with self._transaction() as database:
                for kind, row in rows.items():
                    _settle(database, row, bill.spent[kind])

    def entries(self) -> list[Entry]:
        """Every entry, oldest first: a mapping of `COLUMNS`."""
        with self._transaction() as database:
            self._bury_the_dead(database)
            rows = database.execute(f"SELECT {', '.join(COLUMNS)} FROM entries ORDER BY id").fetchall()
        return [cast(Entry, dict(zip(COLUMNS, row, strict=True))) for row in rows]

    def spent(self) -> int:
        """FLOPs that are gone, and those that are reserved now."""
        with self._transaction() as database:
            return _total(database)

    def to_json(self) -> Report:
        """What ``ledger --json`` writes: `cap`, `spent`, `left`, `entries`."""
        return _report(self.entries(), self.cap)

    def _create(self) -> None:
        """Make the file under another name and link it into place: nobody ever sees it half made, or empty."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._unwritable(error) from None
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.part")
        temporary.unlink(missing_ok=True)
        try:
            with closing(sqlite3.connect(temporary)) as database:
                database.executescript(_SCHEMA)
            os.link(temporary, self.path)
        except sqlite3.OperationalError as error:
            raise self._unwritable(error) from None
        except OSError:  # another process was faster, or the disk knows no links
            if not self.path.exists():
                os.replace(temporary, self.path)
        finally:
            temporary.unlink(missing_ok=True)

    def _unwritable(self, error: sqlite3.OperationalError | OSError) -> UserError:
        return UserError(
            f"{self.path}: the ledger cannot be written ({error}); free it, or set M2_LEDGER to another file"
        )

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """The file, locked against every other process from the first look to the last write."""
        try:
            # mode=rw: a file that is deleted meanwhile is not silently started afresh
            place = f"{self.path.absolute().as_uri()}?mode=rw"
            with closing(sqlite3.connect(place, uri=True, timeout=BUSY_SECONDS, isolation_level=None)) as database:
                database.execute("BEGIN IMMEDIATE")
                if database.execute("PRAGMA application_id").fetchone() != (APPLICATION_ID,):
                    raise sqlite3.DatabaseError("no mark of a ledger in its header")
                try:
                    yield database
                except BaseException:
                    if database.in_transaction:  # of a full disk SQLite has rolled back itself
                        database.execute("ROLLBACK")
                    raise
                database.execute("COMMIT")
        except sqlite3.OperationalError as error:  # locked, read-only, deleted, disk full
            raise self._unwritable(error) from None
        except sqlite3.DatabaseError as error:
            raise UserError(
                f"{self.path}: damaged, or not a ledger ({error}); move it away, or set M2_LEDGER to another file"
            ) from None

    def _bury_the_dead(self, database: sqlite3.Connection) -> None:
        """Count what dead processes had reserved as spent, all of it."""
        for row, owner in database.execute("SELECT id, owner FROM entries WHERE state = 'reserved'").fetchall():
            if not _alive(owner):
                database.execute("UPDATE entries SET state = 'lost' WHERE id = ?", (row,))


def ledger_path(base: Payer | str) -> Path:
    """Where the ledger of a base is, if anything was spent on it: ``ledger.sqlite`` in its folder under ``checkpoint/``
    (`paths.own_folder`), or the file that the variable ``M2_LEDGER`` names.

    Raises
    ------
    UserError
        If the name of a base is given that is not on this machine.
    """
    folder = own_folder(base) if isinstance(base, str) else folder_of(base.name, base.sha256)
    named = os.environ.get("M2_LEDGER")
    return Path(named) if named else folder / "ledger.sqlite"


def ledger_note(name: str, path: Path) -> str:
    """What has to be said beside a ledger that does not bear the name of the base whose it is; else empty."""
    shipped = name == EMBEDDED or Path(name).resolve() == EMBEDDED_BASE.resolve()
    if os.environ.get("M2_LEDGER") or shipped or path.parent.name.startswith(f"{short_name(name)}-"):
        return ""
    return f" (of the same weights as {name}: one base, whatever a copy is called)"


def default_ledger(base: Payer | str) -> Ledger:
    """The ledger of a base, made when it does not exist (see `ledger_path`)."""
    return Ledger(ledger_path(base))


def read_ledger(path: Path) -> Report:
    """What a ledger holds. Nothing has been spent where there is no file, and none is made."""
    return Ledger(path).to_json() if path.exists() else _report([], CAP)


def _report(entries: list[Entry], cap: int) -> Report:
    spent = sum(entry["flops"] for entry in entries)
    return {"cap": cap, "spent": spent, "left": cap - spent, "entries": entries}


def _total(database: sqlite3.Connection) -> int:
    (total,) = database.execute("SELECT coalesce(sum(flops), 0) FROM entries").fetchone()
    return total


def _insert(database: sqlite3.Connection, spender: Spender, kind: str, cost: Cost) -> int:
    names = (*COLUMNS[1:], "owner")
    amounts = (cost.tokens, cost.flops, cost.flops_course)
    values = (_now(), spender.run, spender.stage, kind, spender.settings_sha256, *amounts, "reserved", _owner())
    places = ", ".join("?" * len(names))
    row = database.execute(f"INSERT INTO entries ({', '.join(names)}) VALUES ({places})", values).lastrowid
    assert row is not None  # it is after an INSERT that went well
    return row


def _settle(database: sqlite3.Connection, row: int, cost: Cost) -> None:
    if not cost.tokens:
        database.execute("DELETE FROM entries WHERE id = ?", (row,))
        return
    change = "UPDATE entries SET state = 'settled', time = ?, tokens = ?, flops = ?, flops_course = ? WHERE id = ?"
    database.execute(change, (_now(), cost.tokens, cost.flops, cost.flops_course, row))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _owner() -> str:
    """This process: host, number, and when it started, because numbers are used again."""
    return f"{socket.gethostname()} {os.getpid()} {psutil.Process().create_time():.0f}"


def _alive(owner: str) -> bool:
    """Whether a process still runs. One of another host may: its reservation stays, and counts in full as well."""
    host, pid, started = owner.rsplit(" ", 2)
    if host != socket.gethostname():
        return True
    try:
        process = psutil.Process(int(pid))
        return abs(process.create_time() - float(started)) < 2 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
