"""What a ledger asks of the database it stands in."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

Answer = TypeVar("Answer")


class Rows(Protocol):
    """What a statement found."""

    def fetchone(self) -> Any: ...

    def fetchall(self) -> Sequence[Any]: ...


class Execute(Protocol):
    """Run one SQL statement; values stand in it as ``:name``."""

    def __call__(self, statement: str, values: Mapping[str, object] = {}, /) -> Rows: ...


class Store(Protocol):
    """Where entries are kept: a table ``entries``, with `COLUMNS` and the owner of each."""

    @property
    def name(self) -> str:
        """What messages call it; holds no password."""

    def run(self, work: Callable[[Execute], Answer]) -> Answer:
        """Do some work in one transaction, locked against every other process from the first look to the last write.

        The work may be done again where it is not known whether its end arrived: it must come to the same.

        Raises
        ------
        UserError
            If the database is damaged, no ledger, or cannot be written.
        """


SCHEMA = """
CREATE TABLE entries (
    id {identity},
    time TEXT NOT NULL,
    run TEXT NOT NULL,
    stage TEXT NOT NULL,
    kind TEXT NOT NULL,
    settings_sha256 TEXT NOT NULL,
    tokens {integer} NOT NULL CHECK (tokens >= 0),
    flops {integer} NOT NULL CHECK (flops >= 0),
    flops_course {integer} NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('reserved', 'settled', 'lost')),
    owner TEXT NOT NULL
)
"""


def without_password(where: str) -> str:
    """The URL of a database as messages may show it; a file's name stays as it is."""
    return re.sub(r"(://[^:/@]*):[^@]*@", r"\1:***@", where)
