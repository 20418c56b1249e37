"""A ledger in one file of this machine."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import psutil

from ..files import UserError
from .entries import COLUMNS
from .stores import SCHEMA, Answer, Execute

APPLICATION_ID = 0x4D32464C  # in the file's header: a database that is not a ledger is told from one that is
BUSY_SECONDS = 60.0
# File systems that other machines write too, on which SQLite's locks do not hold (sqlite.org/faq.html, question 5).
_TEXTS = ("time", "run", "stage", "kind", "settings_sha256", "state")
_MOST = 10**18  # FLOPs of an entry: more than any cap, and a sum of nine of them is still a number to SQLite
NETWORKED = {"afs", "beegfs", "ceph", "cifs", "gpfs", "lustre", "nfs", "nfs4", "panfs", "smb3", "smbfs"} | {
    f"fuse.{name}" for name in ("ceph", "glusterfs", "sshfs", "s3fs", "rclone")
}


class SqliteStore:
    """A file, made when it does not exist.

    Raises
    ------
    UserError
        If the file is damaged or something else than a ledger, which is left as it is, or on a network file system.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        kind = _file_system(path)
        if kind in NETWORKED:
            raise UserError(
                f"{path}: on a network file system ({kind}), where the locks of SQLite do not hold; "
                "set M2_LEDGER to a file on a local disk, or to postgresql://user@host/database"
            )
        if not path.exists():
            self._create()
        elif not path.is_file():
            raise UserError(f"{path}: is a folder, a pipe or a device; set M2_LEDGER to a file")
        self.run(self._check)

    @property
    def name(self) -> str:
        return str(self.path)

    def run(self, work: Callable[[Execute], Answer]) -> Answer:
        try:
            # mode=rw: a file that is deleted meanwhile is not silently started afresh
            place = f"{self.path.absolute().as_uri()}?mode=rw"
            with closing(sqlite3.connect(place, uri=True, timeout=BUSY_SECONDS, isolation_level=None)) as database:
                database.execute("PRAGMA trusted_schema = OFF")
                database.execute("BEGIN IMMEDIATE")
                if database.execute("PRAGMA application_id").fetchone() != (APPLICATION_ID,):
                    raise sqlite3.DatabaseError("no mark of a ledger in its header")
                try:
                    answer = work(database.execute)
                except BaseException:
                    if database.in_transaction:  # of a full disk SQLite has rolled back itself
                        database.execute("ROLLBACK")
                    raise
                database.execute("COMMIT")
                return answer
        except sqlite3.OperationalError as error:  # locked, read-only, deleted, disk full
            raise self._unwritable(error) from None
        except (sqlite3.DatabaseError, UnicodeDecodeError) as error:  # the latter of text that is none
            raise UserError(
                f"{self.path}: damaged, or not a ledger ({error}); move it away, or set M2_LEDGER to another file"
            ) from None

    @staticmethod
    def _check(execute: Execute) -> None:
        (problem,) = execute("PRAGMA quick_check(1)").fetchone()
        if problem != "ok":
            raise sqlite3.DatabaseError(" ".join(problem.split()))
        # A view or a trigger of a stranger's would run as the file is read, or make of a bill what it likes.
        kinds = execute("SELECT type, name FROM sqlite_master WHERE type <> 'index'").fetchall()
        if kinds != [("table", "entries")]:
            raise sqlite3.DatabaseError("other tables than a ledger's")
        columns = {name for _, name, *_ in execute("PRAGMA table_info(entries)").fetchall()}
        if columns != {*COLUMNS, "owner"}:
            raise sqlite3.DatabaseError("other columns than a ledger's")
        numbers = [name for name in COLUMNS if name not in _TEXTS]
        wrong = [f"typeof({name}) <> 'integer' OR {name} < 0 OR {name} > {_MOST}" for name in numbers]
        wrong += [f"typeof({name}) <> 'text'" for name in (*_TEXTS, "owner")]
        counting = f"SELECT count(*) FROM entries WHERE {' OR '.join(wrong)}"  # noqa: S608 (our own names)  # nosec B608
        if execute(counting).fetchone() != (0,):
            raise sqlite3.DatabaseError("an entry that no ledger writes")

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
                schema = SCHEMA.format(identity="INTEGER PRIMARY KEY", integer="INTEGER")
                database.executescript(f"PRAGMA application_id = {APPLICATION_ID};{schema};")
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


def _file_system(path: Path) -> str:
    """What the disk that a file is on is called by the system; empty where it does not say."""
    place = Path(os.path.realpath(path))
    found = {part.mountpoint: part.fstype for part in psutil.disk_partitions(all=True)}
    return next((found[str(folder)] for folder in place.parents if str(folder) in found), "")
