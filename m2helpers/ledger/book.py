"""The book that every FLOP of an experiment is written in, and that cannot be overspent.

Spending is reserved before it happens and settled after, each in one transaction that locks the book, so the sum of what
is settled and what is reserved never passes the cap, however many processes spend at once. What a process had reserved
when it died counts in full: nobody knows how far it got.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import cast
from uuid import uuid4

import psutil

from ..flops.account import CAP
from ..flops.costs import Cost
from ..paths import EMBEDDED, EMBEDDED_BASE, folder_of, own_folder, short_name
from .entries import COLUMNS, Bill, CapReached, Entry, Payer, Report, Spender
from .stores import Execute, Store


class Ledger:
    """A ledger, made when it does not exist.

    Parameters
    ----------
    where : path or str
        A SQLite file, or the URL of a PostgreSQL database that several machines share, ``postgresql://user@host/database``.
    cap : int
        FLOPs, exact account.

    Raises
    ------
    UserError
        If there is something else than a ledger, which is left as it is, or the database cannot be reached.
    """

    def __init__(self, where: str | os.PathLike, cap: int = CAP) -> None:
        self.where, self.cap = where, cap
        self._store = _store(where)

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
        needed, owner = sum(cost.flops for cost in most.values()), _owner()

        def enter(execute: Execute) -> dict[str, int]:
            _bury_the_dead(execute)
            execute("DELETE FROM entries WHERE owner = :owner", {"owner": owner})  # where this is done again
            left = self.cap - _total(execute)
            if needed > left:
                raise CapReached(
                    f"{place}{self._store.name}: {needed:.4g} FLOPs are needed next and {left:.4g} are left of "
                    f"{self.cap:.0e}; spend less, or start another ledger (see the page on the ledger)"
                )
            return {kind: _insert(execute, spender, kind, cost, owner) for kind, cost in most.items()}

        rows = self._store.run(enter)
        bill = Bill(most)

        def settle(execute: Execute) -> None:
            for kind, row in rows.items():
                _settle(execute, row, bill.spent[kind])

        try:
            yield bill
        finally:
            self._store.run(settle)

    def entries(self) -> list[Entry]:
        """Every entry, oldest first: a mapping of `COLUMNS`."""

        def read(execute: Execute) -> Sequence[tuple]:
            _bury_the_dead(execute)
            return execute(f"SELECT {', '.join(COLUMNS)} FROM entries ORDER BY id").fetchall()

        return [cast(Entry, dict(zip(COLUMNS, row, strict=True))) for row in self._store.run(read)]

    def spent(self) -> int:
        """FLOPs that are gone, and those that are reserved now."""
        return self._store.run(_total)

    def to_json(self) -> Report:
        """What ``ledger --json`` writes: `cap`, `spent`, `left`, `entries`."""
        return _report(self.entries(), self.cap)


def _store(where: str | os.PathLike) -> Store:
    if isinstance(where, str) and "://" in where:
        from .postgres import PostgresStore

        return PostgresStore(where)
    from .sqlite import SqliteStore

    return SqliteStore(Path(where))


def ledger_path(base: Payer | str) -> Path | str:
    """Where the ledger of a base is, if anything was spent on it: ``ledger.sqlite`` in its folder under ``checkpoint/``
    (`paths.own_folder`), or the file or URL that the variable ``M2_LEDGER`` names.

    Raises
    ------
    UserError
        If the name of a base is given that is not on this machine.
    """
    folder = own_folder(base) if isinstance(base, str) else folder_of(base.name, base.sha256)
    named = os.environ.get("M2_LEDGER")
    return (named if "://" in named else Path(named)) if named else folder / "ledger.sqlite"


def ledger_note(name: str, path: Path | str) -> str:
    """What has to be said beside a ledger that is not, or does not bear the name, of a base alone; else empty."""
    if os.environ.get("M2_LEDGER"):
        return " (named by M2_LEDGER: one budget for all bases)"
    shipped = name == EMBEDDED or Path(name).resolve() == EMBEDDED_BASE.resolve()
    if shipped or Path(path).parent.name.startswith(f"{short_name(name)}-"):
        return ""
    return f" (of the same weights as {name}: one base, whatever a copy is called)"


def default_ledger(base: Payer | str) -> Ledger:
    """The ledger of a base, made when it does not exist (see `ledger_path`)."""
    return Ledger(ledger_path(base))


def read_ledger(where: Path | str) -> Report:
    """What a ledger holds. Nothing has been spent where there is no file, and none is made."""
    return _report([], CAP) if isinstance(where, Path) and not where.exists() else Ledger(where).to_json()


def _report(entries: list[Entry], cap: int) -> Report:
    spent = sum(entry["flops"] for entry in entries)
    return {"cap": cap, "spent": spent, "left": cap - spent, "entries": entries}


def _bury_the_dead(execute: Execute) -> None:
    """Count what dead processes had reserved as spent, all of it."""
    for row, owner in execute("SELECT id, owner FROM entries WHERE state = 'reserved'").fetchall():
        if not _alive(owner):
            execute("UPDATE entries SET state = 'lost' WHERE id = :id", {"id": row})


def _total(execute: Execute) -> int:
    (total,) = execute("SELECT coalesce(sum(flops), 0) FROM entries").fetchone()
    return int(total)  # PostgreSQL's sum is a decimal


def _insert(execute: Execute, spender: Spender, kind: str, cost: Cost, owner: str) -> int:
    values = {
        "time": _now(),
        "run": spender.run,
        "stage": spender.stage,
        "kind": kind,
        "settings_sha256": spender.settings_sha256,
        "tokens": cost.tokens,
        "flops": cost.flops,
        "flops_course": cost.flops_course,
        "state": "reserved",
        "owner": owner,
    }
    places = ", ".join(f":{name}" for name in values)
    (row,) = execute(f"INSERT INTO entries ({', '.join(values)}) VALUES ({places}) RETURNING id", values).fetchone()
    return row


def _settle(execute: Execute, row: int, cost: Cost) -> None:
    if not cost.tokens:
        execute("DELETE FROM entries WHERE id = :id", {"id": row})
        return
    change = {"time": _now(), "tokens": cost.tokens, "flops": cost.flops, "flops_course": cost.flops_course}
    places = ", ".join(f"{name} = :{name}" for name in change)
    execute(f"UPDATE entries SET state = 'settled', {places} WHERE id = :id", {"id": row, **change})


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _owner() -> str:
    """A reservation's: host, number and start of this process (numbers are used again), and a ticket of its own."""
    return f"{socket.gethostname()} {os.getpid()} {psutil.Process().create_time():.0f} {uuid4().hex}"


def _alive(owner: str) -> bool:
    """Whether a process still runs. One of another host may: its reservation stays, and counts in full as well."""
    host, pid, started, *_ = owner.split()
    if host != socket.gethostname():
        return True
    try:
        process = psutil.Process(int(pid))
        return abs(process.create_time() - float(started)) < 2 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
