"""What an entry of the ledger is, who spends, and what is spent of a reservation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, TypedDict

from ..files import UserError
from ..flops.costs import Cost

COLUMNS = ("id", "time", "run", "stage", "kind", "settings_sha256", "tokens", "flops", "flops_course", "state")


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
