"""A ledger in a PostgreSQL database, for the processes of several machines."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping

from ..files import UserError
from .stores import SCHEMA, Answer, Execute, Rows, without_password

LOCK = 0x4D32464C  # number of the lock that every transaction takes first
PAUSES = (1, 2, 4, 8, 15, 30, 60, 60)  # seconds between two attempts to reach a database that was there before


class PostgresStore:
    """The table ``m2helpers.entries`` of a database, made when it does not exist.

    An advisory lock orders the transactions of all processes. A run whose database goes away pauses, tries again for three
    minutes, and then stops.

    Parameters
    ----------
    url : str
        ``postgresql://user:password@host:port/database``; what is left out is taken from the environment, as ``psql`` does.

    Raises
    ------
    UserError
        If the URL is none of PostgreSQL, the packages are missing, or the database cannot be reached.
    """

    def __init__(self, url: str) -> None:
        try:
            import psycopg  # noqa: F401
            from sqlalchemy import create_engine
            from sqlalchemy.engine import make_url
            from sqlalchemy.exc import ArgumentError
            from sqlalchemy.pool import NullPool
        except ImportError as error:
            raise UserError(f"a ledger in PostgreSQL needs {error.name}; pip install 'm2helpers[cluster]'") from None
        self.name = without_password(url)
        try:
            parsed = make_url(url)
        except (ArgumentError, ValueError):
            raise UserError(f"{self.name}: not a URL; give a file, or postgresql://user@host/database") from None
        if parsed.drivername not in ("postgresql", "postgres"):
            raise UserError(f"{self.name}: no such kind of ledger; give a file, or postgresql://user@host/database")
        ask = {"connect_timeout": 10, "options": "-c search_path=m2helpers -c lock_timeout=60s", "keepalives_idle": 30}
        # A connection for each transaction: they are few, and a process that is forked shares none.
        self._engine = create_engine(parsed.set(drivername="postgresql+psycopg"), poolclass=NullPool, connect_args=ask)
        self._attempt(self._create)

    def run(self, work: Callable[[Execute], Answer]) -> Answer:
        for i, pause in enumerate(PAUSES):
            try:
                return self._attempt(work)
            except _Unreachable as error:
                if not i:
                    warnings.warn(f"{error}; trying again for {sum(PAUSES):.0f} seconds", stacklevel=2)
                time.sleep(pause)
        try:
            return self._attempt(work)
        except _Unreachable as error:
            raise UserError(f"{error}; what was saved can be resumed once the database is back") from None

    def _attempt(self, work: Callable[[Execute], Answer]) -> Answer:
        from sqlalchemy import text
        from sqlalchemy.exc import DBAPIError, OperationalError

        try:
            with self._engine.begin() as connection:

                def execute(statement: str, values: Mapping[str, object] = {}, /) -> Rows:
                    return connection.execute(text(statement), dict(values))

                execute("SELECT pg_advisory_xact_lock(:lock)", {"lock": LOCK})
                return work(execute)
        except DBAPIError as error:
            cause = " ".join(str(error.orig).split())
            if isinstance(error, OperationalError) or error.connection_invalidated:
                raise _Unreachable(f"{self.name}: the ledger's database cannot be reached ({cause})") from None
            raise UserError(f"{self.name}: not a ledger, or no right to write it ({cause})") from None

    @staticmethod
    def _create(execute: Execute) -> None:
        (there,) = execute("SELECT to_regclass('m2helpers.entries') IS NOT NULL").fetchone()
        if not there:
            execute("CREATE SCHEMA IF NOT EXISTS m2helpers")
            execute(SCHEMA.format(identity="BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY", integer="BIGINT"))


class _Unreachable(UserError):
    """The database did not answer: it may, in a while."""
